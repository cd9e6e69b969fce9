"""A backend of `torch.compile` that counts graphs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import StackSummary
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._logging._internal import trace_log


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __deepcopy__(self, memo: Any) -> Graphs:  # `generate` copies its options
        return self

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:  # noqa: ARG002
        self.made += 1
        return graph.forward


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """A process that has compiled nothing, and that compiles without what only people read.

    Dynamo measures how long the guards of each graph take; it notes stacks of calls for its messages; and it writes a
    trace as soon as its logger has a handler, which pytest gives to every logger that does not propagate. No test reads
    any of it.
    """
    torch.compiler.reset()
    collects = gc.isenabled()
    gc.disable()
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(torch._dynamo.guards, "profile_guard_manager", return_value=0.0, create=True),
            mock.patch.object(torch._dynamo.exc, "_extract_stack_with_positions", StackSummary, create=True),
            mock.patch.object(trace_log, "propagate", True),
        ):
            warnings.simplefilter("ignore")  # Dynamo says where it breaks graphs
            yield
    finally:
        torch.compiler.reset()
        if collects:
            gc.enable()


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """A counting backend, where nothing is compiled."""
    with nothing_compiled():
        yield Graphs()

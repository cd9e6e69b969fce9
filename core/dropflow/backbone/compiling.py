"""Compiled code: which of this package belongs into it, and whether this thread is making some.

`torch.compiler.is_compiling` and `is_exporting` answer for the process: they are true while any thread compiles.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

import torch
from torch._dynamo import trace_rules
from torch._guards import detect_fake_mode

COMPILED = (
    "dropflow.engine.model.stand_in",
    "dropflow.engine.model.traced_step",
    "dropflow.engine.tokens.room",
    "dropflow.engine.tokens.static_layers",
)
"""Modules whose code runs inside what is compiled: layers, whose caches they append to, and decode steps."""

is_traced = torch.compiler.is_dynamo_compiling
"""Whether the code that asks is being compiled: false wherever it runs, true in the graph that Dynamo makes of it."""


def is_exported() -> bool:
    """Whether this thread runs a model for `torch.export`, which does so on tensors without data."""
    return torch.compiler.is_exporting() and detect_fake_mode() is not None


@cache  # the rules are global to the process, and every call would add one
def leave_uncompiled() -> None:
    """Make Dynamo leave the code of this package uncompiled, but still compile what it calls, such as layers.

    Not that of `COMPILED`: a layer that is compiled by itself, and a decode step, would be cut in two there.
    """
    _skip(__name__.partition(".")[0])


def _skip(package: str) -> None:
    for found in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
        if any(name.startswith(f"{found.name}.") for name in COMPILED):
            _skip(found.name)
        elif found.name not in COMPILED:
            trace_rules.add(found.name)

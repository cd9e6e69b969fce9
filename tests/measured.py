"""Benchmarks that are measured once for several tests of what is told about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any


def once(bench: Callable[..., Any]) -> Callable[..., Any]:
    """A benchmark that runs on its first call alone; later ones return its results with their own number of rounds.

    They must ask for what `bench` takes, as the first one.
    """
    found: list[Any] = []

    def call(*args: Any, rounds: int, **options: Any) -> Any:
        signature(bench).bind(*args, rounds=rounds, **options)
        if not found:
            found.append(bench(*args, rounds=rounds, **options))
        return replace(found[0], rounds=rounds)

    return call

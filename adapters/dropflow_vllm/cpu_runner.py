"""Lets vLLM's CPU runner ask models for positions, as its other runners do.

Its `load_model` (0.32) leaves out the line that finds out whether a model tells positions apart for every row.
"""

from __future__ import annotations

import functools
from typing import Any

MARK = "_dropflow"


def ask_for_positions() -> None:
    """Add that line for the models of this package; a second call changes nothing."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    plain = CPUModelRunner.load_model
    if hasattr(plain, MARK):
        return

    @functools.wraps(plain)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        served = getattr(self.get_model(), "served", None)
        if served is not None and served.persistent:
            self.is_multimodal_pruning_enabled = True

    setattr(load_model, MARK, True)
    CPUModelRunner.load_model = load_model

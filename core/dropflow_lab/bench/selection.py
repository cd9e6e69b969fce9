"""Meters what one stage's selection costs: seconds inside its hooks and taps, and the largest tensor it allocates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dropflow.encode
import dropflow.run
from dropflow import Flow, load_policy
from dropflow.backbone import backbone_for
from dropflow.hooks import HOOKS
from dropflow.plan import Plan, resolve


class SelectionMeter:
    """Counts the selection of one stage of an attached plan.

    Selection is all that runs inside the stage's hook answers, the attention rows it asks for included (the norm, q, k
    and RoPE that a probe computes, and the softmax over rows), and what a tap of an earlier layer adds to that layer:
    opening it, keeping q and k, closing it. Moving the survivors and fitting masks is the engine's work, and no part of
    it. Measures CPU time on the wall clock: work that a GPU has only been given would be missed.
    """

    def __init__(self, plan: Plan, stage: str) -> None:
        """Put the meter around the hooks of `plan`; `stage` is its name in the policy."""
        self.seconds: list[float] = []
        """One entry per call of `measure`."""
        self.largest_tensor = 0
        """Elements of the largest tensor that selection has allocated in any call of `watch`."""
        self._stage = dict(plan.stages)[stage]
        self._taps = bool(self._stage.taps or self._stage.vision_taps)
        self._now = 0.0
        self._watches = False
        for hook in HOOKS:
            if any(one is self._stage for _, one in plan.hooks.implementers(hook)):
                setattr(plan.hooks, hook, self._around(getattr(plan.hooks, hook)))

    def measure(self, run: Callable[[], object]) -> None:
        """Run once and note the seconds of selection."""
        self._now = 0.0
        with self._timed_taps():
            run()
        self.seconds.append(self._now)

    def watch(self, run: Callable[[], object]) -> None:
        """Run once and note the largest tensor of selection; slow, so never to be timed."""
        self._watches = True
        try:
            run()
        finally:
            self._watches = False

    def _around(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def metered(call: Any, stage: Any = None) -> Any:
            given = (call,) if stage is None else (call, stage)
            if stage is not None and stage is not self._stage:
                return hook(*given)
            if self._watches:
                with _Allocations() as seen:
                    answer = _at_once(hook(*given))
                self.largest_tensor = max(self.largest_tensor, seen.largest)
                return answer
            return self._timed(lambda: _at_once(hook(*given)))

        return metered

    def _timed(self, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self._now += time.perf_counter() - start

    @contextmanager
    def _timed_taps(self) -> Iterator[None]:
        """Time the taps of decoder and vision layers; all of them are the stage's where it has any."""
        with ExitStack() as patched:
            for module in (dropflow.run, dropflow.encode) if self._taps else ():
                patched.enter_context(patch.object(module, "tap", self._timed_tap(module.tap)))
            yield

    def _timed_tap(self, tap: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def timed(implementation: str, seen: Callable[[Any], None]) -> Iterator[None]:
            opened = tap(implementation, lambda layer: self._timed(lambda: seen(layer)))
            self._timed(opened.__enter__)
            try:
                yield
            finally:
                self._timed(lambda: opened.__exit__(None, None, None))

        return timed


@contextmanager
def metered(model: Any, policy: Any, stage: str) -> Iterator[SelectionMeter]:
    """Attach `policy` to `model` with a meter around the stage of that name in the policy."""
    backbone = backbone_for(model)
    plan = resolve(load_policy(policy), backbone.shape)
    meter = SelectionMeter(plan, stage)
    with Flow(backbone, plan):
        yield meter


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Elements of the largest tensor that no operation merely looked at anew."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            for one in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(one, torch.Tensor):
                    self.largest = max(self.largest, one.numel())
        return output


def _at_once(answer: Any) -> Any:
    """Answers of `inject` and `exit` come from a generator, which would run outside the clock."""
    return iter(list(answer)) if isinstance(answer, Iterator) else answer

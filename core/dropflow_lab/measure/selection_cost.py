"""Measures the cost of selection: seconds and FLOPs inside hooks and taps, and the largest tensor allocated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dropflow
from dropflow.lifecycle.hooks import HOOKS
from dropflow.lifecycle.spans import watched
from dropflow.policy.plan import Plan
from dropflow_lab.measure.flop_count import count_flops
from dropflow_lab.measure.timing import finish_queued


class SelectionMeter:
    """Measures the selection of one stage of an attached plan, or of all its stages.

    Selection is everything that runs inside the stage's hooks, including the attention rows it requests (the norm, q, k
    and RoPE that a probe computes, and the softmax over rows), and what a tap of an earlier layer adds to that layer:
    opening it, keeping q and k, closing it. Moving the survivors and fitting masks is the engine's work and not part of
    it. On a GPU, the host waits for it wherever the clock is read, so that the rest of a call is slower than without.
    """

    def __init__(self, plan: Plan, stage: str | None = None, clock: Callable[[], float] | None = None) -> None:
        """Wrap the hooks of `plan`; `stage` is the name of a stage in the policy, `None` for all stages.

        `clock` reads seconds; by default those on the wall.
        """
        self._clock = clock or (lambda: time.perf_counter())  # looked up at each reading, so that tests can replace it
        self.seconds: list[float] = []
        """One entry per call of `measure`."""
        self.elapsed = 0.0
        """Seconds of selection so far in the current call of `measure`, or in the last one."""
        self.flops = 0
        """FLOPs (a multiply-add is two) of selection in all calls of `watch`."""
        self.largest_tensor = 0
        """Elements of the largest tensor that selection has allocated in any call of `watch`."""
        self._stages = [one for name, one in plan.stages if stage in (None, name)]
        self._taps = any(one.taps or one.vision_taps or one.decode_taps or one.decode_reads_at for one in self._stages)
        self._watches = self._runs = False
        for hook in HOOKS:
            if any(self._is_metered(one) for _, one in plan.hooks.implementers(hook)):
                setattr(plan.hooks, hook, self._around(getattr(plan.hooks, hook)))

    def measure(self, run: Callable[[], object]) -> None:
        """Run once and record the seconds of selection."""
        self.elapsed = 0.0
        with watched(self._timed) if self._taps else nullcontext():
            run()
        self.seconds.append(self.elapsed)

    def watch(self, run: Callable[[], object]) -> None:
        """Run once and record the FLOPs and the largest tensor of selection; slow, so never time it."""
        self._watches = True
        try:
            run()
        finally:
            self._watches = False

    def _around(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def metered(call: Any, stage: Any = None) -> Any:
            given = (call,) if stage is None else (call, stage)
            if stage is not None and not self._is_metered(stage):
                return hook(*given)
            if self._watches:
                answers = []
                with _Allocations() as seen:
                    self.flops += count_flops(lambda: answers.append(_at_once(hook(*given))))
                self.largest_tensor = max(self.largest_tensor, seen.largest)
                return answers[0]
            with self._timed():
                return _at_once(hook(*given))

        return metered

    def _is_metered(self, stage: Any) -> bool:
        return any(stage is one for one in self._stages)

    @contextmanager
    def _timed(self, name: str = "") -> Iterator[None]:  # noqa: ARG002  # taps are the only spans there are
        """Time a block; a nested block is counted only once."""
        if self._runs:
            yield
            return
        finish_queued()
        self._runs, start = True, self._clock()
        try:
            yield
        finally:
            finish_queued()
            self.elapsed += self._clock() - start
            self._runs = False


@contextmanager
def metered(
    model: Any, policy: Any, stage: str | None = None, clock: Callable[[], float] | None = None
) -> Iterator[SelectionMeter]:
    """Attach `policy` to `model` with a meter around the stage of that name in the policy, or around all stages."""
    with dropflow.attach(model, policy) as flow:
        yield SelectionMeter(flow.plan, stage, clock)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Records the elements of the largest tensor that an operation returned, views excepted."""

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
    """Consume the generators that `inject` and `exit` return, which would otherwise run untimed."""
    return iter(list(answer)) if isinstance(answer, Iterator) else answer

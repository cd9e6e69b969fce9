"""The efficiency benchmark: how far a prefill's time falls as its FLOPs do, from small images to large ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

import dropflow
from dropflow_lab.bench.bare_layers import bare, shapes_in
from dropflow_lab.bench.engine import REDUCED
from dropflow_lab.bench.measured import Measured, clock_of
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.measure.flop_count import Flops, flops_of
from dropflow_lab.measure.machine import this_machine, torch_threads
from dropflow_lab.measure.timing import Spread, interleaved, ratio

POLICIES: Mapping[str, Any] = {"bench-reduced": REDUCED, "pyramiddrop": "pyramiddrop"}
"""One that drops most tokens, and one that halves their number three times; scaled to the depth and to the image."""


@dataclass(frozen=True)
class EfficiencyRow:
    """One policy on one size of image: a prefill, vision tower and LM head included, over that without a policy."""

    policy: str
    visual_tokens: int
    plain_seconds: Spread
    """Time of a prefill without a policy."""
    seconds: Spread
    """Time of a prefill under the policy."""
    flops_ratio: float
    """FLOPs without the policy over FLOPs with it, ranking included; attention counts full rectangles."""
    causal_flops_ratio: float
    """The same where causal attention counts only what it needs, about half (see `Flops.causal`)."""
    speedup: Spread
    efficiency: Spread
    """Speed-up over FLOPs ratio: 1 if time falls in proportion to FLOPs."""
    causal_efficiency: Spread
    """Speed-up over `causal_flops_ratio`; what fused kernels compute lies between both counts."""
    bare_flops_ratio: float
    """FLOPs without the policy over those of the same layers run by hand on as many tokens, without an engine."""
    bare_efficiency: Spread
    """Their speed-up over their own FLOPs ratio: what this machine allows, whose rate depends on the shapes."""
    bare_causal_efficiency: Spread
    """The same where causal attention counts only what it needs."""
    over_bare: Spread
    """Time under the policy over theirs; the ranking, which they lack, is included."""


@dataclass(frozen=True)
class EfficiencyBench(Measured):
    """Results of the efficiency benchmark; times are medians with quartiles over the rounds.

    The image of `subject` is that of the last row.
    """

    rows: tuple[EfficiencyRow, ...]
    rounds: int


def bench_efficiency(
    shape: SubjectShape | None = None,
    sides: Sequence[int] = (24,),
    *,
    rounds: int = 15,
    policies: Mapping[str, Any] = POLICIES,
    threads: int = 1,
) -> EfficiencyBench:
    """Measure a prefill under every policy for images of so many patches along each side, on shared random weights.

    In each round every variant runs once. Samples of a batch differ in length (left padding). On a CPU, times are the
    CPU time of this process, which other programs affect least. Torch's number of threads is set for the duration of
    the measurement.
    """
    shape, rows = shape or SubjectShape(), []
    told, clock = clock_of(shape.device)
    with torch_threads(threads), torch.no_grad():
        for side in sides:
            shape = replace(shape, image_side=side)
            rows += _rows(shape, policies, rounds, clock)
        return EfficiencyBench(tuple(rows), rounds, clock=told, subject=shape, machine=this_machine())


def _rows(
    shape: SubjectShape, policies: Mapping[str, Any], rounds: int, clock: Callable[[], float]
) -> list[EfficiencyRow]:
    plain, inputs = build_model(shape), ragged_prompt(shape)
    runs = {"plain": _Counted(prefill_of(plain, inputs))}
    with ExitStack() as attached:
        for name, policy in policies.items():
            model = twin(plain)
            attached.enter_context(dropflow.attach(model, policy, overrides=["rescale=true"]))
            prefill = prefill_of(model, inputs)
            runs[name] = _Counted(prefill)
            shapes, pictures = shapes_in(model, prefill), {"pixel_values": inputs["pixel_values"]}
            runs[f"bare {name}"] = _Counted(bare(plain, shapes, pictures, masked=shape.batch > 1))
        seconds = interleaved(runs, rounds, clock=clock)
    flops = {run: counted.flops for run, counted in runs.items() if counted.flops is not None}
    return [_row(name, shape, seconds, flops) for name in policies]


def _row(
    name: str, shape: SubjectShape, seconds: Mapping[str, Sequence[float]], flops: Mapping[str, Flops]
) -> EfficiencyRow:
    by_hand = f"bare {name}"
    plain, own, bare_own = flops["plain"], flops[name], flops[by_hand]
    full, causal = plain.full / own.full, plain.causal / own.causal
    speedup, bare_speedup = ratio(seconds["plain"], seconds[name]), ratio(seconds["plain"], seconds[by_hand])
    return EfficiencyRow(
        policy=name,
        visual_tokens=shape.visual_tokens,
        plain_seconds=Spread.of(seconds["plain"]),
        seconds=Spread.of(seconds[name]),
        flops_ratio=full,
        causal_flops_ratio=causal,
        speedup=speedup,
        efficiency=speedup.over(full),
        causal_efficiency=speedup.over(causal),
        bare_flops_ratio=plain.full / bare_own.full,
        bare_efficiency=bare_speedup.over(plain.full / bare_own.full),
        bare_causal_efficiency=bare_speedup.over(plain.causal / bare_own.causal),
        over_bare=ratio(seconds[name], seconds[by_hand]),
    )


class _Counted:
    """A callable whose first call, a warm-up that is not timed, counts its FLOPs."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self.flops: Flops | None = None

    def __call__(self) -> None:
        if self.flops is None:
            self.flops = flops_of(self._run)
        else:
            self._run()


def ragged_prompt(shape: SubjectShape) -> dict[str, Any]:
    """Return the inputs of one prefill whose samples have less and less text before their images (left padding)."""
    inputs, before = build_prompt(shape), shape.text_tokens // 2
    for row in range(shape.batch):
        inputs["attention_mask"][row, : row * before // shape.batch] = 0
    return inputs

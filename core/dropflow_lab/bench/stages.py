"""The stage benchmark: the cost of every shipped stage's selection, and what its policy saves of the prefill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.measure.machine import Machine, this_machine, torch_threads
from dropflow_lab.measure.selection_cost import metered
from dropflow_lab.measure.timing import Spread, interleaved, ratio

SHAPE = SubjectShape(layers=32, vision_hidden=128, vision_layers=4)
"""576 visual and 64 text tokens on 32 layers of width 512; half of the text follows the image as the question."""

_FOUR_KEEPS = {3: 288, 7: 144, 11: 72, 15: 36}
_FILTER = {"use": "mustdrop/dual-attention", "keep": _FOUR_KEEPS}
MEASURED = "measured"
"""Name of the measured stage in every policy of the benchmark."""
POLICIES: dict[str, dict[str, dict[str, Any]]] = {
    "keep-all": {MEASURED: {"use": "control/keep-all"}},
    "random at four layers": {MEASURED: {"use": "control/random", "keep": _FOUR_KEEPS}},
    "random before the LLM": {MEASURED: {"use": "control/random", "encode": 192}},
    "max-min diversity to 192": {MEASURED: {"use": "divprune/max-min", "keep": 192}},
    "conditional DPP to 192": {MEASURED: {"use": "cdpruner/conditional-dpp", "keep": 192}},
    "saliency and coverage to 192": {MEASURED: {"use": "scope/saliency-coverage", "keep": 192}},
    "anchor and expansion to 192": {MEASURED: {"use": "anchorprune/anchor-expansion", "keep": 192}},
    "retention curve to 64": {MEASURED: {"use": "autoprune/retention-curve", "target": 64}},
    "dominant and contextual, 192": {
        MEASURED: {"use": "visionzip/dominant-contextual", "dominant": 162, "contextual": 30},
    },
    "pruned and merged to an eighth": {
        MEASURED: {"use": "prumerge/prune-merge", "variant": "prumerge", "ratio": 0.125},
    },
    "token merging, 128 in each of three layers": {
        MEASURED: {"use": "tome/token-merging", "r": 128, "layers": 3},
    },
    "duplication at 2, to 128": {MEASURED: {"use": "dart/duplication", "at": 2, "keep": 128}},
    "stride at four layers": {MEASURED: {"use": "control/stride", "keep": _FOUR_KEEPS}},
    "stride before the LLM": {MEASURED: {"use": "control/stride", "encode": 192}},
    "pool by 2 x 2": {MEASURED: {"use": "control/pool", "window": (2, 2)}},
    "FastV at 2": {MEASURED: {"use": "fastv/attention-rank", "at": 2, "keep": 0.5}},
    "late injection at 8": {MEASURED: {"use": "hidrop/late-injection", "at": 8}},
    "pyramid of HiDrop at 64": {
        MEASURED: {"use": "hidrop/concave-pyramid", "keep": {10: 215, 14: 10, 16: 5, 18: 1}},
    },
    "early exit at 24": {MEASURED: {"use": "hidrop/early-exit", "at": 24}},
    "merge to 0.5": {MEASURED: {"use": "mustdrop/spatial-merge", "at": 1, "budget": 0.5}},
    "key set of 0.08": {MEASURED: {"use": "mustdrop/key-set", "share": 0.08}},
    "filter at four layers, budgets": {MEASURED: _FILTER},
    "filter at four layers, nothing drops": {
        MEASURED: {
            "use": "mustdrop/dual-attention",
            "at": [*_FOUR_KEEPS],
            "global_threshold": 0,
            "individual_threshold": 0,
        },
    },
    "filter with budgets, then the cache": {
        "filter": _FILTER,
        MEASURED: {"use": "mustdrop/output-aware-cache", "at": 2},
    },
    "PyramidDrop": {MEASURED: {"use": "pyramiddrop/pyramid", "keep": {8: 0.5, 16: 0.25, 24: 0.125}}},
    "SparseVLM at 192": {MEASURED: {"use": "sparsevlm/text-guided", "keep": {3: 300, 7: 200, 16: 110}}},
    "SparseVLM by rank": {
        MEASURED: {"use": "sparsevlm/text-guided", "rank": {"at": [3, 7, 16, 20], "scale": 13.5}},
    },
    "SparseVLM+ at 192": {MEASURED: {"use": "sparsevlm/gravity-corrected", "keep": {3: 300, 7: 200, 16: 118}}},
    "withdrawal at 16": {MEASURED: {"use": "vtw/withdrawal", "at": 16}},
}
"""Stages of each measured policy; numbers are for 32 layers and 576 visual tokens, and scale to other shapes."""


@dataclass(frozen=True)
class StageRow:
    """One stage under one policy; shares are fractions of the prefill time without a policy in the same round."""

    stage: str
    policy: str
    """The measured policy, a key of `POLICIES`."""
    selection_share_of_dense_prefill: Spread
    """Time of this stage's selection (see `SelectionMeter`)."""
    saving_share_of_dense_prefill: Spread
    """Time that the whole policy saves in the prefill, net of selection; negative if the prefill takes longer."""
    largest_tensor: int
    """Elements of the largest tensor that this stage's selection allocates."""


@dataclass(frozen=True)
class StageBench:
    """One row per stage and policy."""

    rows: tuple[StageRow, ...]
    dense_prefill_seconds: Spread
    square_map: int
    """Elements of a full attention map, all tokens by all tokens, which no selection may allocate."""
    rounds: int
    subject: SubjectShape
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with the policies."""
        return asdict(self) | {"policies": POLICIES}


def bench_stages(shape: SubjectShape | None = None, *, rounds: int = 7, threads: int = 1) -> StageBench:
    """Measure all policies in turn in this process, on shared random weights; takes most of a minute per round.

    Torch's number of threads is set for the duration of the measurement.
    """
    shape = shape or SHAPE
    with torch_threads(threads), torch.no_grad(), ExitStack() as attached:
        plain, inputs = build_model(shape), build_prompt(shape)
        runs: dict[str, Callable[[], object]] = {"dense": prefill_of(plain, inputs)}
        meters = {}
        for name in POLICIES:
            model = twin(plain)
            meters[name] = attached.enter_context(metered(model, _policy(name), MEASURED))
            meters[name].watch(prefill_of(model, inputs))
            runs[name] = partial(meters[name].measure, prefill_of(model, inputs))
        seconds = interleaved(runs, rounds)
        selection = {name: meter.seconds[1:] for name, meter in meters.items()}  # without the warm-up round
        rows = (_row(name, seconds, selection[name], meters[name].largest_tensor) for name in POLICIES)
        return StageBench(
            rows=tuple(rows),
            dense_prefill_seconds=Spread.of(seconds["dense"]),
            square_map=(shape.visual_tokens + shape.text_tokens) ** 2,
            rounds=rounds,
            subject=shape,
            machine=this_machine(),
        )


def _policy(name: str) -> dict[str, Any]:
    tuned = {"layers": 32, "visual_tokens": 576}
    return {"name": "bench", "tuned_for": tuned, "rescale": True, "stages": POLICIES[name]}


def _row(name: str, seconds: Mapping[str, list[float]], selection: list[float], largest: int) -> StageRow:
    dense = seconds["dense"]
    return StageRow(
        stage=str(POLICIES[name][MEASURED]["use"]),
        policy=name,
        selection_share_of_dense_prefill=ratio(selection, dense),
        saving_share_of_dense_prefill=ratio([d - s for d, s in zip(dense, seconds[name], strict=True)], dense),
        largest_tensor=largest,
    )

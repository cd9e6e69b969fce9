"""The reuse benchmark: several questions about one image, each asked anew and with a prefix, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, TypeVar

import torch

import dropflow
from dropflow_lab.bench.bare_layers import bare, shapes_in
from dropflow_lab.bench.measured import Measured, clock_of
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, twin
from dropflow_lab.measure.flop_count import Flops, flops_of
from dropflow_lab.measure.machine import this_machine, torch_threads
from dropflow_lab.measure.timing import Spread, interleaved, ratio

POLICIES = ("hidrop-64", "fastv-k2-r50", "divprune-56")
"""A policy that prunes late, one that prunes early, and one that only encodes; scaled to the depth of the model."""


@dataclass(frozen=True)
class ReuseRow:
    """One policy: a prefill of one more question about an image that has been asked about."""

    policy: str
    boundary: int
    """Layers before it run only on what follows the prefix; the number of layers where no stage reads the question."""
    prefix_bytes: int
    """Memory that the prefix holds."""
    anew_seconds: Spread
    """Time of a prefill of whole prompts with their images."""
    again_seconds: Spread
    """Time of a prefill that begins with the prefix, `Prefix.inputs` included."""
    making_seconds: Spread
    """Time to make the prefix."""
    flops_saved: float
    """Share of the FLOPs that the prefix saves of each further question; the limit of `time_saved`."""
    causal_flops_saved: float
    """The same where causal attention without a mask counts only what it needs (see `Flops.causal`)."""
    time_saved: Spread
    """Share of the time that it saves of each further question."""
    efficiency: Spread
    """Share of time saved over share of FLOPs saved: 1 if time falls as FLOPs do."""
    causal_efficiency: Spread
    """Share of time saved over `causal_flops_saved`; what fused kernels compute lies between both counts."""
    bare_saved: Spread
    """Share of the time that is saved where the same layers run by hand on as many tokens, without the engine."""
    bare_efficiency: Spread
    """`bare_saved` over share of FLOPs saved: what this machine allows, whose few rows cost more per FLOP than many."""
    questions_to_pay: int
    """Number of questions from which on prefix and questions together take less time than asking anew; by medians."""


@dataclass(frozen=True)
class ReuseBench(Measured):
    """Results of the reuse benchmark; times are medians with quartiles over the questions."""

    rows: tuple[ReuseRow, ...]
    questions: int


def bench_reuse(
    shape: SubjectShape | None = None,
    *,
    questions: int = 20,
    policies: Sequence[str] = POLICIES,
    threads: int = 1,
) -> ReuseBench:
    """Ask so many questions about one image under every policy, anew and with a prefix in turn, on shared weights.

    `shape.batch` questions are asked at once; those of a batch differ in length. On a CPU, times are the CPU time of
    this process, which other programs affect least. Torch's number of threads is set for the duration of the
    measurement.
    """
    shape = shape or SubjectShape()
    told, clock = clock_of(shape.device)
    with torch_threads(threads), torch.no_grad(), ExitStack() as attached:
        plain, asked, shown = build_model(shape), _questions(shape, questions), build_prompt(replace(shape, batch=1))
        subjects = {}
        for name in policies:
            model = twin(plain)
            flow = attached.enter_context(dropflow.attach(model, name, overrides=_overrides(shape)))
            subjects[name] = _Subject(model, flow, asked, shown)
        runs = {(name, what): run for name, subject in subjects.items() for what, run in subject.runs(plain).items()}
        flops = {run: flops_of(runs[run]) for run in runs}
        seconds = interleaved(runs, questions, clock=clock)
        rows = tuple(_row(subject, name, _of(name, seconds), _of(name, flops)) for name, subject in subjects.items())
        return ReuseBench(rows, questions, clock=told, subject=shape, machine=this_machine())


Found = TypeVar("Found")
_WHATS = ("anew", "again", "making", "bare anew", "bare again")


def _of(name: str, found: Mapping[tuple[str, str], Found]) -> dict[str, Found]:
    return {what: found[name, what] for what in _WHATS}


def _overrides(shape: SubjectShape) -> list[str]:
    """Compact positions, which some policies publish, are not defined for Qwen's."""
    return ["rescale=true", *(["positions=persistent"] if shape.family == "qwen2_5_vl" else [])]


class _Subject:
    """A model under a policy, and the questions that it is asked."""

    def __init__(self, model: Any, flow: dropflow.Flow, asked: Sequence[dict[str, Any]], shown: dict[str, Any]) -> None:
        """`shown` is one prompt with the same beginning as all that is asked."""
        self._model, self._flow, self._asked = model, flow, asked
        self._shown = shown
        self._padded = not bool(asked[0]["attention_mask"].all())
        self.prefix = flow.prefix(**self._shown)

    def runs(self, plain: Any) -> dict[str, Callable[[], object]]:
        """What is timed, by `_WHATS`; every call of one of the first two takes the next question.

        `plain` is the model without a policy.
        """
        questions = {what: cycle(self._asked) for what in ("anew", "again")}

        def anew() -> None:
            self._prefill(next(questions["anew"]))

        def again() -> None:
            self._prefill(self.prefix.inputs(**next(questions["again"])))

        return {
            "anew": anew,
            "again": again,
            "making": lambda: self._flow.prefix(**self._shown),
            "bare anew": bare(plain, shapes_in(self._model, anew), _pictures(self._asked[0]), masked=self._padded),
            "bare again": bare(plain, shapes_in(self._model, again), None),
        }

    def _prefill(self, inputs: dict[str, Any]) -> None:
        self._model(**{"use_cache": True, "logits_to_keep": 1} | inputs)


def _row(subject: _Subject, name: str, seconds: dict[str, list[float]], flops: dict[str, Flops]) -> ReuseRow:
    times = {what: Spread.of(found) for what, found in seconds.items()}
    most = 1 - flops["again"].full / flops["anew"].full
    causal = 1 - flops["again"].causal / flops["anew"].causal
    saved, possible = _saved(seconds["again"], seconds["anew"]), _saved(seconds["bare again"], seconds["bare anew"])
    gain = times["anew"].median - times["again"].median
    return ReuseRow(
        policy=name,
        boundary=subject.prefix.boundary,
        prefix_bytes=subject.prefix.nbytes,
        anew_seconds=times["anew"],
        again_seconds=times["again"],
        making_seconds=times["making"],
        flops_saved=most,
        causal_flops_saved=causal,
        time_saved=saved,
        efficiency=saved.over(most),
        causal_efficiency=saved.over(causal),
        bare_saved=possible,
        bare_efficiency=possible.over(most),
        questions_to_pay=int(times["making"].median / gain) + 1 if gain > 0 else 0,
    )


def _saved(again: Sequence[float], anew: Sequence[float]) -> Spread:
    kept = ratio(again, anew)
    return Spread(1 - kept.median, 1 - kept.high, 1 - kept.low)


def _questions(shape: SubjectShape, count: int) -> list[dict[str, Any]]:
    """Return batches of prompts that begin with the same text and image, padded on the left.

    The first question of a batch has all tokens after the image, the last one the fewest.
    """
    return list(_batches(shape, count))


def _batches(shape: SubjectShape, count: int) -> Iterator[dict[str, Any]]:
    shown = build_prompt(replace(shape, batch=1))
    tokens = shown["input_ids"].shape[1]
    start = shape.text_tokens // 2 + shape.visual_tokens
    visual = int(shown["input_ids"][0, start - 1])
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        asked = torch.randint(2, shape.words, (shape.batch, tokens - start), generator=generator)
        ids = shown["input_ids"].repeat(shape.batch, 1)
        ids[:, start:] = asked.to(ids)
        mask = torch.ones_like(ids)
        for row in range(1, shape.batch):
            padding = row * (tokens - start - 1) // shape.batch
            ids[row] = ids[row].roll(padding)
            ids[row, :padding], mask[row, :padding] = 0, 0
        pictures = {name: torch.cat([value] * shape.batch) for name, value in _pictures(shown).items()}
        kinds = {"mm_token_type_ids": (ids == visual).int()} if "mm_token_type_ids" in shown else {}
        yield {"input_ids": ids, "attention_mask": mask, **kinds, **pictures}


def _pictures(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the processor gave for the pictures."""
    return {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}

"""The overlap benchmark: what encoding beside the text layers saves of a prefill, and what it could save at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import dropflow
from dropflow_lab.bench.random_llava import SHAPES, SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.measure.machine import Machine, this_machine, torch_threads
from dropflow_lab.measure.timing import Spread, interleaved, ratio

ENTRY = 8
"""Boundary where vision enters."""
POLICY: dict[str, Any] = {
    "name": "bench-overlap",
    "description": "the first half of the layers on text alone, then few visual tokens",
    "stages": {
        "inject": {"use": "hidrop/late-injection", "at": ENTRY},
        "pyramid": {"use": "hidrop/concave-pyramid", "keep": {9: 140, 12: 9}},
        "exit": {"use": "hidrop/early-exit", "at": 14},
    },
}


@dataclass(frozen=True)
class OverlapBench:
    """Results of the overlap benchmark; times are medians with quartiles over rounds, one prefill each."""

    serial_ms: Spread
    """Milliseconds of a prefill that encodes first, on `threads` threads."""
    overlap_ms: Spread
    """Milliseconds with the encoder beside the text layers, each on `threads` threads."""
    both_cores_ms: Spread
    """Milliseconds of the serial prefill on twice as many threads, as many as both sides of the overlap have."""
    serial_caller_cpu_ms: Spread
    """CPU milliseconds of the calling thread in the serial prefill; other work on the machine hardly matters."""
    overlap_caller_cpu_ms: Spread
    """The same with overlap: what the calling thread no longer does, the other one does."""
    vision_ms: Spread
    """Milliseconds of the serial prefill in which images are encoded."""
    text_only_ms: Spread
    """Milliseconds of the serial prefill in the layers before vision enters."""
    saved_ms: Spread
    """Milliseconds by which the overlap is faster than the serial prefill of the same round."""
    saved_share: Spread
    """Saved milliseconds over the smaller of `vision_ms` and `text_only_ms`, which is all that can be saved."""
    speedup: Spread
    """Time of the serial prefill over that with overlap."""
    speedup_over_both_cores: Spread
    """Time of the serial prefill on twice as many threads over that with overlap."""
    same_bits: bool
    """Whether both gave the same logits, bit for bit."""
    rounds: int
    subject: SubjectShape
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with the policy."""
        return asdict(self) | {"policy": POLICY}


def bench_overlap(shape: SubjectShape | None = None, *, rounds: int = 15, threads: int = 1) -> OverlapBench:
    """Measure the prefill without overlap, with it, and without it on twice as many threads, in turn."""
    shape = shape or SHAPES["overlap"]
    with torch_threads(threads), torch.no_grad(), _variants(shape) as (serial, beside):
        inputs = build_prompt(shape)
        same = torch.equal(*(model(**inputs, logits_to_keep=1).logits for model in (serial, beside)))
        parts = _Parts(serial)
        cpu: dict[str, list[float]] = {"serial": [], "overlap": []}
        runs: dict[str, Callable[[], Any]] = {
            "serial": _with_cpu_time(cpu["serial"], prefill_of(serial, inputs)),
            "overlap": _with_cpu_time(cpu["overlap"], prefill_of(beside, inputs)),
            "both cores": _on(2 * threads, prefill_of(serial, inputs)),
            "parts": parts.of(prefill_of(serial, inputs)),
        }
        seconds = interleaved(runs, rounds)
        # the first is the warm-up round
        vision, text, *own = (found[1:] for found in (parts.vision, parts.text, cpu["serial"], cpu["overlap"]))
        saved = [one - other for one, other in zip(seconds["serial"], seconds["overlap"], strict=True)]
        return OverlapBench(
            serial_ms=_ms(seconds["serial"]),
            overlap_ms=_ms(seconds["overlap"]),
            both_cores_ms=_ms(seconds["both cores"]),
            serial_caller_cpu_ms=_ms(own[0]),
            overlap_caller_cpu_ms=_ms(own[1]),
            vision_ms=_ms(vision),
            text_only_ms=_ms(text),
            saved_ms=_ms(saved),
            saved_share=ratio(saved, [min(pair) for pair in zip(vision, text, strict=True)]),
            speedup=ratio(seconds["serial"], seconds["overlap"]),
            speedup_over_both_cores=ratio(seconds["both cores"], seconds["overlap"]),
            same_bits=same,
            rounds=rounds,
            subject=shape,
            machine=this_machine(),
        )


@contextmanager
def _variants(shape: SubjectShape) -> Iterator[tuple[Any, Any]]:
    serial = build_model(shape)
    beside = twin(serial)
    with ExitStack() as attached:
        attached.enter_context(dropflow.attach(serial, POLICY))
        attached.enter_context(dropflow.attach(beside, POLICY, overlap=True))
        yield serial, beside


def _ms(seconds: list[float]) -> Spread:
    return Spread.of([1e3 * one for one in seconds])


def _on(threads: int, run: Callable[[], Any]) -> Callable[[], Any]:
    def more() -> Any:
        with torch_threads(threads):
            return run()

    return more


def _with_cpu_time(seconds: list[float], run: Callable[[], Any]) -> Callable[[], Any]:
    def timed() -> Any:
        start = time.thread_time()
        found = run()
        seconds.append(time.thread_time() - start)
        return found

    return timed


class _Parts:
    """Times the parts of a prefill that can overlap, with hooks that stay for one run."""

    def __init__(self, model: Any) -> None:
        core = model.model
        layers = core.language_model.layers
        self._vision = core.vision_tower, core.multi_modal_projector
        self._text = layers[0], layers[ENTRY - 1]
        self.vision: list[float] = []
        self.text: list[float] = []

    def of(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run`, whose parts are timed."""

        def timed() -> Any:
            handles = [*self._timing(*self._vision, self.vision), *self._timing(*self._text, self.text)]
            try:
                return run()
            finally:
                for handle in handles:
                    handle.remove()

        return timed

    @staticmethod
    def _timing(first: Any, last: Any, seconds: list[float]) -> Iterator[Any]:
        began: list[float] = []
        yield first.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
        yield last.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - began[0]))

"""The engine benchmark: the cost of a policy that drops nothing, and the savings of one that drops most tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import torch

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow_lab.bench.random_llava import SHAPES, SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.measure.flop_count import count_flops
from dropflow_lab.measure.machine import Machine, this_machine, torch_threads
from dropflow_lab.measure.timing import Spread, interleaved, ratio

EMPTY: dict[str, Any] = {"name": "no-stages", "stages": {}}
KEEP_ALL: dict[str, Any] = {"name": "keep-all", "stages": {"keep": {"use": "control/keep-all"}}}
REDUCED: dict[str, Any] = {
    "name": "bench-reduced",
    "description": "88.9 % fewer visual tokens on average, in the proportions of HiDrop on 32 layers",
    "tuned_for": {"layers": 16, "visual_tokens": 576},
    "rescale": True,
    "stages": {
        "inject": {"use": "hidrop/late-injection", "at": 4},
        "pyramid": {"use": "hidrop/concave-pyramid", "keep": {5: 140, 8: 9}},
        "exit": {"use": "hidrop/early-exit", "at": 11},
    },
}

RAGGED: dict[str, Any] = {
    "name": "bench-ragged",
    "description": "drops too few tokens to save time, from samples of different lengths",
    "stages": {"pyramid": {"use": "hidrop/concave-pyramid", "keep": {5: 0.97, 8: 0.9}}},
}

_REDUCED_PREFILLS = 4  # calls per sample, so that it takes about as long as one prefill of the others


@dataclass(frozen=True)
class Overhead:
    """Time of a variant that drops nothing, as a ratio to the time without a policy."""

    prefill_ratio: Spread
    decode_ratio: Spread
    """Ratio for one decode step over a cache that holds the whole prompt."""


@dataclass(frozen=True)
class Reduction:
    """What `REDUCED` saves in a prefill; vision tower and LM head are included on both sides."""

    prefill_speedup: Spread
    flops_ratio: float
    """FLOPs without the policy over FLOPs with it, ranking included."""
    efficiency: Spread
    """Speed-up divided by the FLOPs ratio: 1 if time falls in proportion to FLOPs."""
    kv_entries: tuple[int, ...]
    """Entries that each layer's cache actually holds after the prefill."""


@dataclass(frozen=True)
class Ragged:
    """One decode step of two samples of different lengths, after two boundaries each dropped a few of their tokens."""

    decode_ratio: Spread
    """Time under `RAGGED`, as a ratio to the time without a policy on the same padded batch."""
    tiny_decode_ratio: Spread
    """The same on `SHAPES["tiny"]`, where nearly all of the time is overhead."""


@dataclass(frozen=True)
class EngineBench:
    """Results of the engine benchmark; times are medians with quartiles over rounds."""

    noop: Overhead
    """Under a stage that is called before every layer and keeps everything."""
    empty: Overhead
    """Under a policy without stages."""
    control: Overhead
    """A second model without a policy: how far a ratio strays from 1 by chance on this machine."""
    reduced: Reduction
    ragged: Ragged
    attach_ms: Spread
    """Milliseconds to attach `REDUCED` from its mapping, the first time left out."""
    rounds: int
    subject: SubjectShape
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with the reduced policy."""
        return asdict(self) | {"policy": REDUCED}


def bench_engine(
    shape: SubjectShape | None = None, *, rounds: int = 15, decode_steps: int = 8, threads: int = 1
) -> EngineBench:
    """Measure all variants in turn in this process, on shared random weights; takes some seconds per round.

    Torch's number of threads is set for the duration of the measurement.
    """
    shape = shape or SubjectShape()
    with torch_threads(threads), torch.no_grad(), _variants(shape) as models:
        inputs = build_prompt(shape)
        prefills = {name: prefill_of(model, inputs) for name, model in models.items()}
        caches = {name: prefill() for name, prefill in prefills.items()}
        entries = tuple(int(layer.keys.shape[-2]) for layer in caches["reduced"].layers)
        flops_ratio = count_flops(prefills["plain"]) / count_flops(prefills["reduced"])
        prefill = interleaved(prefills, rounds, {"reduced": _REDUCED_PREFILLS})
        steps = {name: _decode(models[name], caches[name]) for name in models if name != "reduced"}
        decode = interleaved(steps, rounds, dict.fromkeys(steps, decode_steps))
        speedup = ratio(prefill["plain"], prefill["reduced"])
        return EngineBench(
            noop=_overhead(prefill, decode, "keep-all"),
            empty=_overhead(prefill, decode, "empty"),
            control=_overhead(prefill, decode, "control"),
            reduced=Reduction(speedup, flops_ratio, speedup.over(flops_ratio), entries),
            ragged=Ragged(*(_ragged(one, rounds, decode_steps) for one in (shape, SHAPES["tiny"]))),
            attach_ms=_attaching(models["plain"], rounds),
            rounds=rounds,
            subject=shape,
            machine=this_machine(),
        )


@contextmanager
def _variants(shape: SubjectShape) -> Iterator[dict[str, Any]]:
    plain = build_model(shape)
    models = {"plain": plain, "control": twin(plain)}
    with ExitStack() as attached:
        for name, policy in (("keep-all", KEEP_ALL), ("empty", EMPTY), ("reduced", REDUCED)):
            models[name] = twin(plain)
            attached.enter_context(dropflow.attach(models[name], policy))
        yield models


def _decode(model: Any, cache: Any) -> Callable[[], Any]:
    """Return a callable that runs one decode step, which adds a token to the cache."""
    token = torch.tensor([[2]])
    return lambda: model(input_ids=token, use_cache=True, **{CACHE_ARGUMENT: cache})


def _ragged(shape: SubjectShape, rounds: int, decode_steps: int) -> Spread:
    """Return the time of a decode step of a ragged batch under `RAGGED`, as a ratio to that without a policy."""
    shape = replace(shape, batch=2)
    inputs, plain = build_prompt(shape), build_model(shape)
    inputs["attention_mask"][1, : shape.text_tokens // 4] = 0
    flowing = twin(plain)
    with dropflow.attach(flowing, RAGGED):
        models = {"plain": plain, "ragged": flowing}
        steps = {name: _padded_decode(model, inputs) for name, model in models.items()}
        samples = interleaved(steps, rounds, dict.fromkeys(steps, decode_steps))
    return ratio(samples["ragged"], samples["plain"])


def _padded_decode(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    """Return a callable that runs one decode step of a padded batch, which adds a token to the cache."""
    cache, seen = prefill_of(model, inputs)(), count(inputs["input_ids"].shape[1] + 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4096), value=1)
    token = torch.full((len(mask), 1), 2)
    return lambda: model(
        input_ids=token, attention_mask=mask[:, : next(seen)], use_cache=True, **{CACHE_ARGUMENT: cache}
    )


def _attaching(model: Any, rounds: int) -> Spread:
    """Return the milliseconds to attach; detaching is not counted."""
    samples = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        flow = dropflow.attach(model, REDUCED)
        seconds = time.perf_counter() - start
        flow.detach()
        samples += [1e3 * seconds] if number else []
    return Spread.of(samples)


def _overhead(prefill: Mapping[str, list[float]], decode: Mapping[str, list[float]], name: str) -> Overhead:
    return Overhead(ratio(prefill[name], prefill["plain"]), ratio(decode[name], decode["plain"]))

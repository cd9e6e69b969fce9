"""The decode benchmark: a step over the cache of a long prompt, all of it read, or a few of its visual entries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow_lab.bench.measured import Measured
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.measure.machine import this_machine, torch_threads
from dropflow_lab.measure.timing import Spread, interleaved, ratio

SHAPE = SubjectShape(image_side=96)
"""9,216 visual and 64 text tokens on 16 layers of width 512."""
EARLY, PUBLISHED = 2, 17 / 36
"""Layers from which on a step reads less: early, and the published share of depth."""


def reading(share: float, at: float) -> dict[str, Any]:
    """Return a policy whose steps read this share of the visual entries from layer `at` on."""
    read = {"use": "visionpulse/decode-read", "at": at, "fixed": share}
    return {"name": "bench-read", "stages": {"read": read}}


@dataclass(frozen=True)
class DecodeBench(Measured):
    """Time of one decode step as a ratio to the plain model's; medians with quartiles over rounds."""

    everything: Spread
    """A policy holds the cache and chooses in every step, and reads everything."""
    late: Spread
    """From the published share of depth on, steps read `share` of the visual entries."""
    early: Spread
    """The same from layer 2 on."""
    control: Spread
    """A second model without a policy: how far a ratio strays from 1 by chance."""
    plain_ms: Spread
    """Milliseconds of a step without a policy."""
    share: float
    entries_read: dict[str, tuple[int, ...]]
    """Entries that each layer has read in the last step, by variant."""
    rounds: int


def bench_decode(
    shape: SubjectShape | None = None,
    *,
    share: float = 0.05,
    rounds: int = 15,
    decode_steps: int = 4,
    threads: int = 1,
    wall: bool = False,
) -> DecodeBench:
    """Measure all variants in turn in this process, on shared random weights; the prefill takes minutes.

    Times are those of the process's CPU, or with `wall` of the clock. Torch's number of threads is set for the duration
    of the measurement.
    """
    shape = shape or SHAPE
    policies = {
        "everything": reading(1.0, EARLY),
        "late": reading(share, PUBLISHED),
        "early": reading(share, EARLY),
    }
    with torch_threads(threads), torch.no_grad(), _variants(shape, policies) as (models, flows):
        inputs, token = build_prompt(shape), torch.full((shape.batch, 1), 2)
        caches = _caches(prefill_of(models["everything"], inputs)(), flows)

        def step(name: str) -> Any:
            given = {CACHE_ARGUMENT: caches[name]}
            return lambda: models[name](input_ids=token, use_cache=True, **given)

        clock = time.perf_counter if wall else time.process_time
        runs = {name: step(name) for name in models}
        seconds = interleaved(runs, rounds, dict.fromkeys(runs, decode_steps), clock=clock)
        return DecodeBench(
            **{name: ratio(seconds[name], seconds["plain"]) for name in (*policies, "control")},
            plain_ms=Spread.of([1e3 * one for one in seconds["plain"]]),
            share=share,
            entries_read={name: _read(models[name], runs[name]) for name in flows},
            clock="wall" if wall else "CPU time of the process",
            rounds=rounds,
            subject=shape,
            machine=this_machine(),
        )


def _read(model: Any, step: Callable[[], object]) -> tuple[int, ...]:
    """Return the number of keys that the attention of each decoder layer gets in one more step, which is not timed."""
    text, seen = model.get_decoder(), list[int]()
    kernel = ALL_ATTENTION_FUNCTIONS[text.config._attn_implementation]

    def counted(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(key.shape[2])
        return kernel(module, query, key, *args, **kwargs)

    with mock.patch.dict(vars(ALL_ATTENTION_FUNCTIONS)["_local_mapping"], {text.config._attn_implementation: counted}):
        step()
    return tuple(seen)


def _caches(filled: Any, flows: Mapping[str, dropflow.Flow]) -> dict[str, Any]:
    """Return a cache for each variant, from that of one prefill, which is dense in all of them."""
    caches = {name: deepcopy(filled) for name in flows}
    for name, flow in flows.items():
        for layer in caches[name].layers:
            layer.written_by = flow.plan.identity
    for name in ("plain", "control"):
        caches[name] = DynamicCache()
        for number, layer in enumerate(filled.layers):
            caches[name].update(layer.keys, layer.values, number)
    return caches


@contextmanager
def _variants(
    shape: SubjectShape, policies: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, dropflow.Flow]]]:
    """Models by variant, and the flows of those with a policy."""
    plain = build_model(shape)
    models: dict[str, Any] = {"plain": plain, "control": twin(plain)}
    flows = {}
    with ExitStack() as attached:
        for name, policy in policies.items():
            models[name] = twin(plain)
            flows[name] = attached.enter_context(dropflow.attach(models[name], policy))
        yield models, flows

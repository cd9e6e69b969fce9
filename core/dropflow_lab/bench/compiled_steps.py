"""The benchmark of compiled decode steps: eager and compiled, without a policy and with one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import nearest
from dropflow_lab.bench.measured import Measured
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.bench.train import OVERRIDES, POLICY
from dropflow_lab.errors import InputError
from dropflow_lab.measure.machine import this_machine, torch_threads
from dropflow_lab.measure.timing import Spread, interleaved, ratio


@dataclass(frozen=True)
class CompiledBench(Measured):
    """One decode step after a prompt, without a policy and with HiDrop-64; medians with quartiles over rounds.

    Eager steps run on a dynamic cache, compiled ones as one graph on a static cache.
    """

    dense_seconds: Spread
    policy_seconds: Spread
    compiled_dense_seconds: Spread
    compiled_policy_seconds: Spread
    dense_gain: Spread
    """Eager over compiled, without a policy."""
    policy_gain: Spread
    """The same with the policy."""
    speedup: Spread
    """Of compiled steps: without a policy over with it."""
    graphs: int
    """Graphs into which the policy's step was compiled; 1 for a step without breaks."""
    capacities: tuple[int, ...]
    """Entries that each layer of the policy's static cache has room for."""
    backend: str
    rounds: int


def bench_compiled(
    shape: SubjectShape,
    *,
    backend: str = "inductor",
    rounds: int = 15,
    decode_steps: int = 4,
    threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> CompiledBench:
    """Measure all variants in turn in this process, on shared random weights.

    On a GPU, inductor's graphs run as CUDA graphs (`mode="reduce-overhead"`). Torch's compiled code is dropped before
    and afterwards. Raises `InputError` for a backend that torch does not have.
    """
    if backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        raise InputError(f"--backend: no backend of torch.compile named {backend!r}; {nearest(backend, known)}")
    torch.compiler.reset()
    with torch_threads(threads), torch.no_grad():
        dense, inputs = build_model(shape), build_prompt(shape)
        model = twin(dense)
        mode = "reduce-overhead" if backend == "inductor" and shape.device != "cpu" else None
        with dropflow.attach(model, POLICY, overrides=OVERRIDES):
            limit = inputs["input_ids"].shape[1] + (rounds + 1) * decode_steps + 1
            steps, caches = {}, {}
            for name, subject in (("dense", dense), ("policy", model)):
                cache = prefill_of(subject, inputs)()
                steps[name] = _Step(subject, cache, shape, limit, inputs["input_ids"].shape[1])
                caches[name] = cache = StaticCache(subject.config.get_text_config(), max_cache_len=limit)
                subject(**inputs, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
                compiled = torch.compile(subject, fullgraph=True, backend=backend, mode=mode, dynamic=False)
                steps[f"compiled {name}"] = _Step(compiled, cache, shape, limit, inputs["input_ids"].shape[1])
            counts = counters["stats"]
            for step in steps.values():
                before = counts["unique_graphs"]
                step()
                made = counts["unique_graphs"] - before
            seconds = interleaved(steps, rounds, dict.fromkeys(steps, decode_steps), clock=clock)
            capacities = tuple(layer.keys.shape[-2] for layer in caches["policy"].layers)
        torch.compiler.reset()
        return CompiledBench(
            **{f"{name.replace(' ', '_')}_seconds": Spread.of(found) for name, found in seconds.items()},
            dense_gain=ratio(seconds["dense"], seconds["compiled dense"]),
            policy_gain=ratio(seconds["policy"], seconds["compiled policy"]),
            speedup=ratio(seconds["compiled dense"], seconds["compiled policy"]),
            graphs=made,
            capacities=capacities,
            backend=backend,
            clock="CPU time of the process" if clock is time.process_time else "wall",
            rounds=rounds,
            subject=shape,
            machine=this_machine(),
        )


class _Step:
    """Decode steps on one cache, each after the other; on a static one with masks of fixed size, as in `generate`."""

    def __init__(self, call: Any, cache: Any, shape: SubjectShape, limit: int, length: int) -> None:
        self._call, self._cache, self._length = call, cache, length
        self._token = torch.full((shape.batch, 1), 2, device=shape.device)
        self._mask = torch.zeros((shape.batch, 1, 1, limit), dtype=torch.bool, device=shape.device)
        self._mask[..., :length] = True

    def __call__(self) -> Any:
        given: dict[str, Any] = {CACHE_ARGUMENT: self._cache}
        if isinstance(self._cache, StaticCache):
            self._mask[..., self._length] = True
            places = torch.full_like(self._token, self._length)
            given |= {"attention_mask": self._mask.clone(), "position_ids": places}
        self._length += 1
        return self._call(input_ids=self._token, use_cache=True, **given)

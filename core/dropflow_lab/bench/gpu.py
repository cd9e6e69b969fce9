"""The GPU benchmark: prefill, overlap, decode (compiled, too), selection, host syncs, reuse and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow_lab.bench.compiled_steps import CompiledBench, bench_compiled
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.bench.reuse import ReuseRow, bench_reuse
from dropflow_lab.bench.train import OVERRIDES, POLICY, TrainBench, bench_train
from dropflow_lab.measure.host_syncs import count_host_syncs
from dropflow_lab.measure.machine import check_device, torch_threads
from dropflow_lab.measure.selection_cost import metered
from dropflow_lab.measure.timing import Spread, interleaved, ratio

_DECODE_STEPS = 8


@dataclass(frozen=True)
class Inference:
    """One prompt (a batch of one), without a policy and with HiDrop-64; the vision tower is included on both sides."""

    prefill_speedup: Spread
    dense_prefill_seconds: Spread
    policy_prefill_seconds: Spread
    overlap_prefill_seconds: Spread
    """With the policy, the image encoded beside the layers before vision enters."""
    overlap_speedup: Spread
    """Prefill with the policy over that with overlap, too."""
    decode_speedup: Spread
    """Of one decode step over a cache that holds the prompt."""
    dense_decode_seconds: Spread
    policy_decode_seconds: Spread
    selection_seconds: Spread
    """Selection inside a prefill with the policy, for which the host waits before and after."""
    dense_host_syncs: int | None
    """Times that the host waits for the GPU in a prefill; `None` where the device is no GPU."""
    policy_host_syncs: int | None


@dataclass(frozen=True)
class GpuRow:
    """Results of one attention implementation."""

    attention: str
    inference: Inference
    compiled: CompiledBench | None
    """Decode steps compiled as one graph; `None` for FlashAttention, which static caches do not go with."""
    reuse: tuple[ReuseRow, ...]
    """A further question about the same image, with a prefix."""
    train: TrainBench

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def bench_gpu(
    shape: SubjectShape, *, rounds: int = 7, threads: int = 1, checkpointing: bool = False
) -> Iterator[GpuRow]:
    """Yield a row for SDPA, and one for FlashAttention if it is installed and the device is a GPU.

    `shape.batch` is the batch size of the training step. Raises `InputError` if there is no such device.
    """
    for attention in _attentions(shape.device):
        own = replace(shape, attention=attention)
        yield GpuRow(
            attention=attention,
            inference=_inference(replace(own, batch=1), rounds, threads),
            compiled=_compiled(replace(own, batch=1), rounds, threads) if attention == "sdpa" else None,
            reuse=bench_reuse(replace(own, batch=1), questions=rounds, threads=threads).rows,
            train=bench_train(own, rounds=rounds, threads=threads, checkpointing=checkpointing),
        )


def device_name(device: str) -> str:
    """Return the name of the GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _inference(shape: SubjectShape, rounds: int, threads: int) -> Inference:
    with torch_threads(threads), torch.no_grad():
        dense, inputs = build_model(shape), build_prompt(shape)
        model, beside = twin(dense), twin(dense)
        subjects = {"dense": dense, "policy": model, "overlap": beside}
        runs = {name: prefill_of(one, inputs) for name, one in subjects.items()}
        with (
            dropflow.attach(model, POLICY, overrides=OVERRIDES),
            dropflow.attach(beside, POLICY, overrides=OVERRIDES, overlap=True),
        ):
            caches = {name: run() for name, run in runs.items()}
            prefill = interleaved(runs, rounds, {"policy": 3, "overlap": 3})
            syncs = {name: count_host_syncs(run, torch.device(shape.device)) for name, run in runs.items()}
            token = torch.tensor([[2]], device=shape.device)
            steps = {
                "dense": lambda: dense(input_ids=token, use_cache=True, **{CACHE_ARGUMENT: caches["dense"]}),
                "policy": lambda: model(input_ids=token, use_cache=True, **{CACHE_ARGUMENT: caches["policy"]}),
            }
            decode = interleaved(steps, rounds, dict.fromkeys(steps, _DECODE_STEPS))
        with metered(model, dropflow.load_policy(POLICY, OVERRIDES)) as meter:
            for _ in range(rounds + 1):
                meter.measure(runs["policy"])
    return Inference(
        prefill_speedup=ratio(prefill["dense"], prefill["policy"]),
        dense_prefill_seconds=Spread.of(prefill["dense"]),
        policy_prefill_seconds=Spread.of(prefill["policy"]),
        overlap_prefill_seconds=Spread.of(prefill["overlap"]),
        overlap_speedup=ratio(prefill["policy"], prefill["overlap"]),
        decode_speedup=ratio(decode["dense"], decode["policy"]),
        dense_decode_seconds=Spread.of(decode["dense"]),
        policy_decode_seconds=Spread.of(decode["policy"]),
        selection_seconds=Spread.of(meter.seconds[1:]),
        dense_host_syncs=syncs["dense"],
        policy_host_syncs=syncs["policy"],
    )


def _compiled(shape: SubjectShape, rounds: int, threads: int) -> CompiledBench:
    backend = "inductor" if torch.device(shape.device).type == "cuda" else "eager"  # a CPU only tries whether it runs
    return bench_compiled(shape, backend=backend, rounds=rounds, decode_steps=_DECODE_STEPS, threads=threads)


def _attentions(device: str) -> list[str]:
    check_device(device)
    if torch.device(device).type != "cuda":
        return ["sdpa"]
    return ["sdpa", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]

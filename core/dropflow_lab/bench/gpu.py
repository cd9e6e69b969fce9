"""The GPU benchmark: prefill and training step of a random LLaVA-1.5-7B, with each available attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

import dropflow
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.bench.train import OVERRIDES, POLICY, TrainBench, bench_train
from dropflow_lab.errors import InputError
from dropflow_lab.measure.machine import torch_threads
from dropflow_lab.measure.timing import Spread, interleaved, ratio


@dataclass(frozen=True)
class GpuRow:
    """Results of one attention implementation, without a policy and with HiDrop-64."""

    attention: str
    prefill_speedup: Spread
    """Speed-up of the prefill of one prompt (a batch of one), vision tower included on both sides."""
    dense_prefill_seconds: Spread
    policy_prefill_seconds: Spread
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
        with torch_threads(threads), torch.no_grad():
            dense, inputs = build_model(replace(own, batch=1)), build_prompt(replace(own, batch=1))
            model = twin(dense)
            with dropflow.attach(model, POLICY, overrides=OVERRIDES):
                runs = {"dense": prefill_of(dense, inputs), "policy": prefill_of(model, inputs)}
                seconds = interleaved(runs, rounds, {"policy": 3})
        del dense, model, runs, inputs
        yield GpuRow(
            attention=attention,
            prefill_speedup=ratio(seconds["dense"], seconds["policy"]),
            dense_prefill_seconds=Spread.of(seconds["dense"]),
            policy_prefill_seconds=Spread.of(seconds["policy"]),
            train=bench_train(own, rounds=rounds, threads=threads, checkpointing=checkpointing),
        )


def device_name(device: str) -> str:
    """Return the name of the GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _attentions(device: str) -> list[str]:
    if torch.device(device).type != "cuda":
        return ["sdpa"]
    if not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch sees no CUDA device here; run this on a machine with a GPU")
    return ["sdpa", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]

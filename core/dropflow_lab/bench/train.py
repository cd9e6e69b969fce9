"""The training benchmark: forward, backward and optimiser step, dense and through HiDrop-64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import dropflow
from dropflow_lab.bench.measured import Measured, clock_of
from dropflow_lab.bench.random_llava import SHAPES, SubjectShape, build_batch, build_model, tower_of, twin
from dropflow_lab.measure.flop_count import Flops, flops_of
from dropflow_lab.measure.machine import this_machine, torch_threads
from dropflow_lab.measure.memory import peak_bytes
from dropflow_lab.measure.timing import Spread, interleaved, ratio

POLICY, OVERRIDES = "hidrop-64", ("rescale=true",)
"""HiDrop at 64 tokens, scaled to the model's depth and number of visual tokens."""
SHAPE = replace(SHAPES["bench"], batch=4)

_REPEATS = {"policy": 3}  # steps per sample, so that it takes about as long as one dense step


@dataclass(frozen=True)
class TrainBench(Measured):
    """One training step without a policy, compared with one through it."""

    step_speedup: Spread
    """Time of a dense step divided by that of a step through the policy."""
    flops_ratio: float
    """FLOPs of forward and backward, dense over policy, ranking included (the optimiser's are not counted)."""
    causal_flops_ratio: float
    """The same where causal attention counts only what it needs, about half (see `Flops.causal`)."""
    peak_memory_ratio: float
    """Bytes held at the peak of a step, dense over policy: weights, optimiser state, gradients and activations."""
    efficiency: Spread
    """Speed-up divided by the FLOPs ratio: 1 if time falls in proportion to FLOPs."""
    causal_efficiency: Spread
    """Speed-up divided by `causal_flops_ratio`; what fused kernels compute lies between both counts."""
    dense_step_seconds: Spread
    policy_step_seconds: Spread
    dense_peak_bytes: int
    policy_peak_bytes: int
    state_bytes: int
    """Bytes of weights and optimiser state, the same for both and included in both peaks."""
    visual_tokens: tuple[int, ...]
    """Visual tokens of one image before each layer, as measured in a step through the policy."""
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with the policy."""
        return super().to_json() | {"policy": dropflow.load_policy(POLICY, OVERRIDES).to_dict()}


def bench_train(
    shape: SubjectShape | None = None, *, rounds: int = 7, threads: int = 1, checkpointing: bool = False
) -> TrainBench:
    """Measure both steps in turn in this process, on shared weights, with AdamW and a frozen vision tower.

    `checkpointing` recomputes activations in the backward pass. On a CPU, times are the CPU time of this process, which
    other programs affect least. Torch's number of threads is set for the duration of the measurement.
    """
    shape = shape or SHAPE
    told, clock = clock_of(shape.device)
    with torch_threads(threads):
        dense = build_model(shape).train()
        tower_of(dense, shape).requires_grad_(False)
        if checkpointing:
            # transformers 5.23 renames the call, 5.20 knows only the second name
            enable = getattr(dense, "activation_checkpointing_enable", None) or dense.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model, batch = twin(dense), build_batch(shape)
        optimizer = torch.optim.AdamW([w for w in dense.parameters() if w.requires_grad], lr=1e-6)
        with dropflow.attach(model, POLICY, overrides=OVERRIDES, logits="labelled") as flow:
            steps = {"dense": _step(dense, batch, optimizer), "policy": _step(model, batch, optimizer)}
            steps["policy"]()  # the optimiser creates its state in its first step
            visual = tuple(round(layer.visual_tokens) for layer in flow.report().layers)
            state = _state_bytes(dense, optimizer)
            peaks = {name: state + peak_bytes(step, torch.device(shape.device)) for name, step in steps.items()}
            flops = {name: flops_of(step) for name, step in steps.items()}
            seconds = interleaved(steps, rounds, _REPEATS, clock=clock)
        known = {"state_bytes": state, "visual_tokens": visual, "rounds": rounds, "clock": told, "subject": shape}
        return _summary(seconds, flops, peaks, **known)


def _summary(
    seconds: Mapping[str, list[float]], flops: Mapping[str, Flops], peaks: Mapping[str, int], **known: Any
) -> TrainBench:
    speedup = ratio(seconds["dense"], seconds["policy"])
    full = flops["dense"].full / flops["policy"].full
    causal = flops["dense"].causal / flops["policy"].causal
    return TrainBench(
        step_speedup=speedup,
        flops_ratio=full,
        causal_flops_ratio=causal,
        peak_memory_ratio=peaks["dense"] / peaks["policy"],
        efficiency=speedup.over(full),
        causal_efficiency=speedup.over(causal),
        dense_step_seconds=Spread.of(seconds["dense"]),
        policy_step_seconds=Spread.of(seconds["policy"]),
        dense_peak_bytes=peaks["dense"],
        policy_peak_bytes=peaks["policy"],
        machine=this_machine(),
        **known,
    )


def _step(model: Any, batch: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the weights and of their optimiser state."""
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *kept))

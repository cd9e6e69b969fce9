"""What happened in a call, kept as tensors until somebody asks for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.backbone import flops
from dropflow.backbone.flops import DecoderWidths
from dropflow.engine.tokens.prompt import Prompt

if TYPE_CHECKING:
    from dropflow.policy.plan import Plan


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer in the last prefill; means over the samples of the batch."""

    layer: int
    """Number of the decoder layer."""
    visual_tokens: float
    """Live in the layer."""
    kv_entries: float
    """Tokens this layer's cache held after the prefill and its `decode_cache` stages, those of earlier turns too."""
    flops: float
    """Multiply-adds of this layer, text included (`dropflow.flops.layer`)."""


@dataclass(frozen=True)
class Report:
    """Tokens, work and memory of the last prefill that brought images; means over the samples of the batch.

    FLOPs are multiply-adds of the decoder layers by closed formula, text included, the work of ranking and the LM
    head left out. KV bytes are those after the prefill and what `decode_cache` stages evicted then; entries that pad a
    ragged batch are not counted.
    """

    policy: str
    """Name of the policy."""
    layers: tuple[LayerReport, ...]
    """One row per decoder layer."""
    average_visual_tokens: float
    """Visual tokens per layer, averaged over all L layers."""
    entry_visual_tokens: float
    """Visual tokens handed to the LLM, after the encode stages."""
    flops: float
    """Of all decoder layers."""
    flops_dense: float
    """The same with every visual token in every layer."""
    kv_bytes: float
    """Of all layers, in the dtype of the states."""
    kv_bytes_dense: float
    """The same with every visual token in every layer."""

    def __str__(self) -> str:
        """A table by layer, and what it sums up to."""
        rows = [
            f"{row.layer:5} {row.visual_tokens:13.6g} {row.kv_entries:10.6g} {row.flops:13.4g}" for row in self.layers
        ]
        return "\n".join(
            [
                f"{self.policy}: {self.entry_visual_tokens:g} visual tokens at entry to the LLM, "
                f"{self.average_visual_tokens:.2f} on average over {len(self.layers)} layers",
                f"{'layer':>5} {'visual tokens':>13} {'KV entries':>10} {'multiply-adds':>13}",
                *rows,
                f"multiply-adds {self.flops:.4g} (dense {self.flops_dense:.4g}), "
                f"KV bytes {self.kv_bytes:g} (dense {self.kv_bytes_dense:g})",
            ]
        )


@dataclass
class CallRecord:
    """Live tokens from each boundary on."""

    plan: Plan
    shape: DecoderWidths
    prompt: Prompt
    bytes_per_number: int
    past: tuple[int, ...] = ()
    """Entries that each layer's cache held before the call."""
    seen: int = 0
    """Logical tokens of earlier calls."""
    held: tuple[Int[Tensor, "batch"], ...] = ()
    """Tokens in each layer's cache once `decode_cache` stages were asked; empty where there are none."""
    segments: list[tuple[int, Tensor]] = field(default_factory=list)
    merges: dict[int, Tensor] = field(default_factory=dict)
    """Boundary -> logical index of the token in whose place each one's state is from there on."""

    def add(self, boundary: int, live: Tensor, merged: Tensor | None = None) -> None:
        """Note that `live` (batch, tokens) holds from `boundary` on, and who was `merged` into whom there."""
        self.segments.append((boundary, live))
        if merged is not None:
            self.merges[boundary] = merged

    def live(self) -> Bool[Tensor, "layers batch tokens"]:
        """Tokens that were live before each layer."""
        return torch.stack([self._live(layer) for layer in range(self.plan.shape.layers)])

    def report(self) -> Report:
        """Sum the call up."""
        prompt, depth = self.prompt, self.plan.shape.layers
        text = prompt.text.sum(1).tolist()
        present = (prompt.present & prompt.visual).sum(1).tolist()
        dense = prompt.visual.sum(1).tolist()
        past = self.past or (0,) * depth
        rows = [self._layer(layer, text, past[layer]) for layer in range(depth)]
        seen = self.seen
        dense_flops = _mean([flops.layer(n + t, seen + n + t, self.shape) for n, t in zip(dense, text, strict=True)])
        dense_kv = _mean([seen + n + t for n, t in zip(dense, text, strict=True)]) * depth
        return Report(
            policy=self.plan.policy.name,
            layers=tuple(rows),
            average_visual_tokens=_mean([row.visual_tokens for row in rows]),
            entry_visual_tokens=_mean(present),
            flops=sum(row.flops for row in rows),
            flops_dense=dense_flops * depth,
            kv_bytes=sum(row.kv_entries for row in rows) * flops.kv_bytes(1, self.shape, self.bytes_per_number),
            kv_bytes_dense=dense_kv * flops.kv_bytes(1, self.shape, self.bytes_per_number),
        )

    def _live(self, layer: int) -> Tensor:
        return [live for boundary, live in self.segments if boundary <= layer][-1]

    def _layer(self, layer: int, text: list[int], past: int) -> LayerReport:
        visual = (self._live(layer) & self.prompt.visual).sum(1).tolist()
        work = [flops.layer(n + t, past + n + t, self.shape) for n, t in zip(visual, text, strict=True)]
        held = _mean(self.held[layer].tolist()) if self.held else past + _mean(visual) + _mean(text)
        return LayerReport(layer, _mean(visual), held, _mean(work))


def _mean(values: list[int] | list[float]) -> float:
    return sum(values) / len(values)

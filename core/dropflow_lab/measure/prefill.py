"""Visual tokens, FLOPs and KV bytes of prompts, as sums that add up over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dropflow import Flow
from dropflow.backbone import flops
from dropflow.backbone.backbone import Backbone


@dataclass(frozen=True)
class Prefill:
    """What prompts took in their prefill; every number is a sum over the prompts."""

    prompts: int = 0
    """Number of prompts."""
    average_visual_tokens: float = 0.0
    """Visual tokens per decoder layer, averaged over all layers."""
    average_visual_tokens_answer: float = 0.0
    """The same, averaged over all forwards of each answer: fewer where stages evict while decoding."""
    entry_visual_tokens: float = 0.0
    """Visual tokens handed to the LLM."""
    flops: float = 0.0
    """Multiply-adds of all decoder layers by the closed formula, as in `dropflow.Report`."""
    flops_dense: float = 0.0
    """The same with every visual token in every layer."""
    kv_bytes: float = 0.0
    """Bytes of keys and values after the prefill."""
    kv_bytes_dense: float = 0.0
    """The same with every visual token in every layer."""

    @classmethod
    def of(cls, backbone: Backbone, flow: Flow | None, inputs: Mapping[str, Any]) -> Prefill:
        """Return what a batch took that has just run under `flow` (`None`: without a policy).

        `inputs` are those of the model, with `input_ids` and `attention_mask` of shape (batch, tokens).
        """
        prompts = int(inputs["input_ids"].shape[0])
        visual = backbone.placeholders(inputs["input_ids"])
        if flow is None or flow.plan.idle or not bool(visual.any()):
            return _dense(backbone, inputs["attention_mask"].sum(1).tolist(), float(visual.sum()))
        report = flow.report()
        fields = [name for name in cls.__dataclass_fields__ if name != "prompts"]
        return cls(prompts, **{name: getattr(report, name) * prompts for name in fields})

    def __add__(self, other: Prefill) -> Prefill:
        """Return what both took together."""
        own, others = asdict(self), asdict(other)
        return Prefill(**{name: value + others[name] for name, value in own.items()})

    def means(self) -> dict[str, float]:
        """Return every number as the mean over the prompts; empty if there were none."""
        if not self.prompts:
            return {}
        return {name: value / self.prompts for name, value in asdict(self).items() if name != "prompts"}


def dense_flops(backbone: Backbone, tokens: int) -> float:
    """Return the multiply-adds of all decoder layers for a prompt of `tokens` tokens, all of them in every layer."""
    widths, shape = backbone.decoder_widths, backbone.shape
    layers = [float(flops.layer(tokens, tokens, widths))] * shape.layers
    for number, _ in shape.producers:  # no projections of k and v
        layers[number] -= tokens * 2 * widths.hidden * widths.kv_heads * widths.head_dim
    for number, per_token in backbone.work_without_attention.items():
        layers[number] = float(tokens * per_token)
    return sum(layers)


def _dense(backbone: Backbone, lengths: list[int], visual: float) -> Prefill:
    number = backbone.text.dtype.itemsize
    work = sum(dense_flops(backbone, tokens) for tokens in lengths)
    held = float(flops.kv_bytes(sum(lengths), backbone.decoder_widths, number) * len(backbone.shape.holding))
    return Prefill(len(lengths), visual, visual, visual, work, work, held, held)

"""Closed formulas for the work of a decoder layer. One multiply-add counts as one operation, as in pruning papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

N = TypeVar("N", int, "Tensor")


@dataclass(frozen=True)
class DecoderWidths:
    """Widths of a text decoder."""

    hidden: int
    """d, the hidden size."""
    intermediate: int
    """m, the width of the gated MLP (three matrices); in a mixture of experts, of those that a token passes through."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Numbers per head."""
    vocabulary: int
    """Rows of the LM head."""

    @classmethod
    def of(cls, config: Any) -> DecoderWidths:
        """The widths in a text decoder's transformers config; where layers differ in heads, the mean over layers."""
        heads = config.num_attention_heads
        layers = getattr(config, "per_layer_config", None) or ()
        own = [config.per_layer_config[number] for number in range(config.num_hidden_layers)] if layers else [config]
        return cls(
            hidden=config.hidden_size,
            intermediate=_intermediate(config),
            heads=heads,
            kv_heads=_mean(own, "num_key_value_heads", heads),
            head_dim=_mean(own, "head_dim", config.hidden_size // heads),
            vocabulary=config.vocab_size,
        )


def _mean(layers: Sequence[Any], name: str, otherwise: int) -> int:
    """The mean of an entry of the layers' configs, rounded."""
    values = [getattr(layer, name, None) or otherwise for layer in layers]
    return round(sum(values) / len(values))


LLAVA_7B = DecoderWidths(hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128, vocabulary=32064)
"""LLaVA-1.5-7B, the shape that published numbers of average tokens and FLOPs refer to."""


def _intermediate(config: Any) -> int:
    experts, width = getattr(config, "num_experts_per_tok", None), getattr(config, "moe_intermediate_size", None)
    if experts and width:
        shared: int = getattr(config, "shared_expert_intermediate_size", None) or 0
        return int(experts * width + shared)
    size = config.intermediate_size
    return round(sum(size) / len(size)) if isinstance(size, list | tuple) else int(size)


def vision_only(tokens: float, shape: DecoderWidths) -> float:
    """Multiply-adds of one layer for `tokens` visual tokens alone: 4 n d^2 + 2 n^2 d + 3 n d m.

    The papers' formula (PyramidDrop, HiDrop section 4.2): it leaves out text tokens, cross attention to text and
    the work of ranking, and counts all heads as KV heads.
    """
    n, d, m = tokens, shape.hidden, shape.intermediate
    return 4 * n * d * d + 2 * n * n * d + 3 * n * d * m


def layer(queries: N, keys: N, shape: DecoderWidths) -> N:
    """Multiply-adds of one decoder layer that runs `queries` tokens against `keys` cache entries.

    Counts q, k, v and output projections (GQA-aware), q.k and attention.v over the full queries x keys rectangle (as
    fused kernels are counted, not the causal half), and the gated MLP. Elementwise where the counts are tensors.
    """
    d, m, q, kv = shape.hidden, shape.intermediate, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return queries * (2 * d * q + 2 * d * kv + 3 * d * m) + 2 * queries * keys * q


def without_attention(layer: Any, config: Any) -> int:
    """Multiply-adds per token of a decoder layer with a recurrent state or a convolution, or without a mixer.

    An estimate from the layer's weights: its matrices, its convolution, of its experts those that a token passes
    through, and 4 heads d_k d_v for reading and writing a recurrent state. The past costs nothing.
    """
    work, weights = 0, dict(layer.named_parameters())
    for name, weight in weights.items():
        if weight.dim() == 2 or "conv" in name:
            work += weight.numel()
        elif weight.dim() == 3:  # (experts, out, in)
            work += int(weight.numel() * (getattr(config, "num_experts_per_tok", 1) or 1) / weight.shape[0])
    return work + (_state(config) if any("A_log" in name for name in weights) else 0)


def _state(config: Any) -> int:
    """Multiply-adds with which a token reads and writes the recurrent state of one layer; 0 where sizes are unknown."""
    heads = getattr(config, "linear_num_value_heads", None)
    if heads:
        return int(4 * heads * config.linear_key_head_dim * config.linear_value_head_dim)
    heads = getattr(config, "mamba_num_heads", None)
    return int(4 * heads * config.mamba_head_dim * config.ssm_state_size) if heads else 0


def kv_bytes(entries: int, shape: DecoderWidths, bytes_per_number: int) -> int:
    """Bytes of keys and values of one layer that holds `entries` tokens."""
    return 2 * entries * shape.kv_heads * shape.head_dim * bytes_per_number

"""Refuses decoder layers that no policy can serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dropflow.backbone.mixers import ATTENTION
from dropflow.engine.model.arguments import annotated_parameters
from dropflow.engine.tokens.restricting import SHARED_KEYS
from dropflow.errors import UnsupportedModel

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone


BLOCKS = frozenset({"minimax_m3_sparse", "compressed_sparse_attention", "heavily_compressed_attention"})
"""Kinds of layers whose queries choose among blocks of neighbouring keys, or read such blocks as one key."""


def check_mixers(backbone: Backbone) -> None:
    """Raise `UnsupportedModel` for a decoder with a layer whose tokens mix in a way that dropping one would change."""
    mixers = backbone.mixers
    layers: list[Any] = list(backbone.text._modules["layers"]._modules.values())
    for number, mixer in enumerate(mixers):
        if mixer.kind == "shared" and SHARED_KEYS not in (annotated_parameters(layers[number]) or {SHARED_KEYS: None}):
            raise UnsupportedModel(
                f"text decoder: layer {number} shares the keys of layer {mixer.producer}, but not through an argument "
                f"`{SHARED_KEYS}`, so the engine cannot restrict them; no policy can be attached to this model"
            )
    other = next((number for number, mixer in enumerate(mixers) if mixer.kind == "other"), None)
    if other is not None:
        name = mixers[other].name
        raise UnsupportedModel(
            f"text decoder: layer {other} is of kind {name!r}: {_reason(name, backbone.text.config)}; no policy can be "
            "attached to this model"
        )
    if all(mixer.kind != "attention" for mixer in mixers):
        raise UnsupportedModel(
            "text decoder: none of its layers has attention; no policy can be attached to this model"
        )


def _reason(kind: str, config: Any) -> str:
    """Why a layer of a kind other than those of `backbone.mixers` cannot run on fewer tokens."""
    if kind in ATTENTION:
        return "it shares the keys of an earlier layer of its kind, of which there is none"
    if kind in ("hybrid", "hybrid_sliding"):
        if hasattr(config, "rel_extent"):
            return "its attention counts distances by slot, and dropping a token shifts the slots"
        return "it keeps keys and a recurrent state in one cache layer, in which they cannot hold different tokens"
    if kind == "reference_sliding_attention":
        return "its cache drops generated tokens by itself, so that entries cannot be told apart"
    block = _block(kind, config)
    if block is not None or kind in BLOCKS:
        size = "" if block is None else f"{block} "
        return f"its attention picks blocks of {size}neighbouring keys, and dropping a token shifts the blocks"
    if kind == "indexed_attention":
        best = getattr(config, "index_topk", None)
        return (
            f"its indexer keeps the best {'few' if best is None else best} keys and breaks ties by slot, so that "
            "dropping tokens changes which keys others see"
        )
    return "dropflow does not know what dropping a token changes there"


def _block(kind: str, config: Any) -> int | None:
    """Number of neighbouring keys that a layer pools, compresses or picks together; `None` for single keys."""
    rates = getattr(config, "compress_rates", None) or {}
    named = ("index_block_size", "index_kpool", "indexer_compress_ratio")
    sizes = (rates.get(kind), *(getattr(config, name, None) for name in named))
    return next((int(size) for size in sizes if size and size > 1), None)

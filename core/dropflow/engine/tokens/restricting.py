"""Restricts the arguments of a decoder layer, each identified by its name, to the live tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from dropflow.engine.tokens.live_set import LiveSet
from dropflow.errors import UnsupportedCall, UnsupportedModel, nearest

TOKEN_DIMS: Mapping[str, int] = {
    "position_ids": -1,
    "position_embeddings": -2,
    "position_embeddings_global": -2,
    "position_embeddings_local": -2,
    "per_layer_input": -2,
    "moe_mm_token_type_ids": -1,
    "input_ids": -1,
    "labels": -1,
    "ple_input_ids": -1,
}
"""Argument of a decoder layer -> the token dimension of its tensors."""
SHARED_KEYS = "shared_kv_states"
"""Argument of a decoder layer in which some layers leave keys and values for others, by kind of layer."""
OWN_WAY = frozenset({"attention_mask", "hidden_states", SHARED_KEYS})
"""Arguments that the engine adjusts separately, as it does the cache."""
CACHES = frozenset({"past_key_values", "past_key_value", "cache", "layer_past"})
"""Names of the cache parameter of decoder layers, used if their annotations do not identify it."""
WITHOUT_TOKENS = frozenset({"use_cache", "output_attentions", "output_router_logits"})
"""Parameters of decoder layers that hold no per-token values."""
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments with which padding-free batches state where documents begin and how long they are."""


def restrict(name: str, value: Any, live: LiveSet, more: Mapping[str, int]) -> Any:
    """Restrict one argument of a decoder layer to the live tokens; values without a token dimension pass unchanged.

    Tuples and lists are restricted element by element; a batch dimension of 1 is broadcast. `more` are arguments that
    the backbone names (`Backbone.token_arguments`).
    """
    if isinstance(value, tuple | list):
        return type(value)(restrict(name, item, live, more) for item in value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    dim = more.get(name) or TOKEN_DIMS[name]
    return _take(value, live.index) if dim == -2 else _take(value[..., None], live.index)[..., 0]


def check_arguments(arguments: Mapping[str, Any], live: LiveSet, more: Mapping[str, int]) -> None:
    """Raise `UnsupportedCall` for an argument of a decoder layer that cannot be restricted to some of its tokens."""
    for name, value in arguments.items():
        if name in PACKED and value is not None:
            raise UnsupportedCall(
                f"{name}: states where the documents of a padding-free batch begin, which changes from layer to layer "
                "under a policy; pad the batch, or, if all layers have attention, pack it with `position_ids` that "
                "restart"
            )
        tensors = [] if name in OWN_WAY else list(_tensors(value))
        if tensors and name not in TOKEN_DIMS and name not in more:
            raise UnsupportedCall(
                f"{name}: the decoder's layers receive tensors of shape {tuple(tensors[0].shape)} under this name, "
                f"which dropflow does not know (transformers {transformers.__version__}); state "
                "its token dimension in `Backbone.token_arguments`"
            )
        dim = more.get(name) or TOKEN_DIMS.get(name, 0)
        for tensor in tensors:
            if tensor.dim() < -dim or tensor.shape[dim] != live.total:
                raise UnsupportedCall(
                    f"{name}: of shape {tuple(tensor.shape)}, expected {live.total} tokens in dimension {dim}"
                )


def check_parameters(layer: str, parameters: Mapping[str, Any], more: Iterable[str]) -> None:
    """Raise `UnsupportedModel` for a decoder layer that takes an argument unknown to the engine.

    `parameters` are those of its forward, with their annotations.
    """
    caches = [name for name, annotation in parameters.items() if name in CACHES or "Cache" in str(annotation)]
    known = {*TOKEN_DIMS, *OWN_WAY, *WITHOUT_TOKENS, *caches, *more}
    unknown = [name for name in parameters if name not in known and name != "kwargs"]
    version = f"transformers {transformers.__version__}"
    if unknown:
        raise UnsupportedModel(
            f"{layer}.forward: takes {', '.join(unknown)}, which dropflow does not know ({version}); name it in "
            f"`Backbone.token_arguments`, or use another version. {nearest(unknown[0], known)}"
        )
    if len(caches) > 1 or (not caches and "kwargs" not in parameters):
        found = f"several caches ({', '.join(caches)})" if caches else "no cache"
        raise UnsupportedModel(f"{layer}.forward: takes {found}, expected one ({version})")


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.dim() else []
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, Mapping) and not isinstance(value, Cache):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []


def _take(value: Tensor, index: Int[Tensor, "batch slots"]) -> Tensor:
    """Rows of dimension -2 of a (..., batch or 1, tokens, dim) tensor, by sample."""
    batch, slots = index.shape
    index = index.to(value.device)
    if value.dim() == 2:
        value = value[None]
    if batch == 1:
        return value.index_select(-2, index[0])
    lead, dim = value.shape[:-3], value.shape[-1]
    value = value.expand(*lead, batch, *value.shape[-2:])
    return value.gather(-2, index.view(*[1] * len(lead), batch, slots, 1).expand(*lead, batch, slots, dim))

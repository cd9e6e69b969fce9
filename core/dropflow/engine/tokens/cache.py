"""The KV cache under a policy: finds and converts its layers, and tells what they hold.

Only layers with attention have entries. Layers with a recurrent state or a convolution, and layers without a cache, are
left as they are: a state has no token dimension, and is already that of the tokens the layer ran on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import DYNAMIC, STATIC, FlowLayer, Indexed, UniformLayer, is_quantized
from dropflow.engine.tokens.static_layers import StaticFlowLayer
from dropflow.errors import UnsupportedCall, UnsupportedModel

if TYPE_CHECKING:
    from dropflow.units import BackboneShape


def check_cache(cache: Any, shape: BackboneShape, *, uniform: bool) -> None:
    """Raise `UnsupportedModel` for a cache that cannot hold the tokens a policy keeps.

    `uniform` says that all layers will hold the same tokens, which every kind of layer with one entry per token allows.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise UnsupportedModel(f"{CACHE_ARGUMENT}: expected a transformers DynamicCache, got {type(cache).__name__}")
    if cache.offloading:
        raise UnsupportedModel(f"{CACHE_ARGUMENT}: an offloaded cache is not supported; use a plain DynamicCache")
    replicated = cache.layer_class_to_replicate
    if not uniform and replicated not in (None, DynamicLayer):
        raise UnsupportedModel(
            f"{CACHE_ARGUMENT}: layers of type {replicated.__name__} cannot hold a different length each; use a plain "
            "DynamicCache"
        )
    if len(cache.layers) > shape.layers:
        raise UnsupportedModel(
            f"{CACHE_ARGUMENT}: expected at most {shape.layers} layers, got {len(cache.layers)}; start with a fresh "
            "cache"
        )
    holding = shape.holding
    missing = range(len(cache.layers), holding[-1] + 1)
    unfit = [number for number, layer in enumerate(cache.layers) if _has_entries(layer) != (number in holding)]
    if unfit or not set(missing) <= set(holding):
        raise UnsupportedModel(
            f"{CACHE_ARGUMENT}: some layers of this model have no attention, or share the keys of others, and the "
            "cache does not know which; make it by DynamicCache(config=model.config)"
        )
    _adopted(cache, uniform=uniform, written_by=None)


def convert_cache(
    cache: Cache,
    shape: BackboneShape,
    *,
    uniform: bool,
    written_by: Any,
    real: Bool[Tensor, "batch tokens"] | None = None,
) -> None:
    """Replace the layers of the caller's cache that have entries, in place, by layers that record their tokens.

    `real` is false for padding among the tokens seen so far.
    """
    adopted = _adopted(cache, uniform=uniform, written_by=written_by, real=real)
    replicated = cache.layer_class_to_replicate or DynamicLayer
    for _ in range(len(adopted), shape.holding[-1] + 1):
        adopted.append(
            FlowLayer(written_by=written_by) if replicated is DynamicLayer else UniformLayer(replicated(), written_by)
        )
    cache.layers[:] = adopted


def _has_entries(layer: Any) -> bool:
    """Whether a cache layer has one entry per token, rather than a state or nothing."""
    return isinstance(layer, CacheLayerMixin)


def _adopted(cache: Cache, *, uniform: bool, written_by: Any, real: Tensor | None = None) -> list[Any]:
    found, limit = [], limit_of(cache)
    for number, layer in enumerate(cache.layers):
        where = f"{CACHE_ARGUMENT}.layers[{number}]"
        emptied = isinstance(layer, Indexed) and layer.written_by is None
        inner = layer.inner if emptied and type(layer) is UniformLayer else layer
        if not _has_entries(inner) or isinstance(inner, StaticFlowLayer) or _stays(inner, uniform=uniform):
            found.append(inner)
        elif uniform and type(inner) not in (*DYNAMIC, *STATIC, FlowLayer):
            found.append(UniformLayer.adopt(inner, where, written_by, real))
        else:
            found.append(FlowLayer.adopt(inner, where, written_by, real, limit))
    return found


def _stays(layer: Any, *, uniform: bool) -> bool:
    """Whether a layer records its tokens already, in a way that fits a policy."""
    return isinstance(layer, Indexed) and layer.written_by is not None and (uniform or type(layer) is not UniformLayer)


def limit_of(cache: Cache) -> int | None:
    """Number of tokens that a static cache may see; `None` for other caches.

    Raises `UnsupportedModel` for one all of whose layers have sliding windows, of which none tells.
    """
    kept = next((one.limit for one in cache.layers if isinstance(one, FlowLayer | StaticFlowLayer)), None)
    if kept is not None:
        return kept
    static = [layer for layer in cache.layers if type(layer) in STATIC]
    if not static:
        return None
    limits = [int(layer.get_max_length()) for layer in static if not layer.is_sliding]
    if not limits:
        raise UnsupportedModel(
            f"{CACHE_ARGUMENT}: every layer of this static cache has a sliding window, and none tells how many tokens "
            "it may see; use a plain DynamicCache"
        )
    return max(limits)


def is_static(cache: Any) -> bool:
    """Whether a cache is one of fixed size, whatever stands for its layers during a call."""
    return isinstance(cache, Cache) and any(
        type(layer) in (*STATIC, StaticFlowLayer) or (isinstance(layer, FlowLayer) and layer.limit is not None)
        for layer in cache.layers
    )


def fix_static(cache: Cache, traced_by: Any = None, *, compact: bool = False) -> None:
    """Give the layers of a static cache tensors of fixed size for what they hold now, and for what may follow.

    They hold it in dynamic layers during a call that may change it. `traced_by` and `compact` as in `StaticFlowLayer`.
    """
    fixed = []
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, FlowLayer) or layer.limit is None or not layer.is_initialized:
            continue
        if layer.written_by is None:
            index = KeyIndex.plain(layer.keys.shape[0], 0, layer.keys.device)
        else:
            index = layer.full_index()
        cache.layers[number] = StaticFlowLayer(layer, index, layer.limit, traced_by, compact=compact)
        fixed.append(cache.layers[number])
    if traced_by is not None and traced_by.step.vary(tuple(layer.keys.shape[-2] for layer in fixed)):
        for layer in fixed:
            layer.vary()


def loosen_static(cache: Any) -> None:
    """Let the layers of a static cache grow for a call that may change what they hold; undone by `fix_static`.

    One host synchronisation per layer.
    """
    if isinstance(cache, Cache):
        cache.layers[:] = [layer.dynamic() if isinstance(layer, StaticFlowLayer) else layer for layer in cache.layers]


def first_held(cache: Any) -> Any:
    """The first layer of a cache that has entries; `None` for no cache, or one without such layers."""
    return next(filter(_has_entries, cache.layers), None) if isinstance(cache, Cache) else None


def is_flow_cache(cache: Any) -> bool:
    """Whether the cache was written under a policy that dropped something, and not emptied since."""
    first = first_held(cache)
    return isinstance(first, Indexed) and first.written_by is not None


def flow_layers(cache: Cache) -> dict[int, FlowLayer | UniformLayer]:
    """The layers of a cache written under a policy that have entries, by number of the decoder layer."""
    return {number: layer for number, layer in enumerate(cache.layers) if isinstance(layer, FlowLayer | UniformLayer)}


def indices_of(cache: Any, shape: BackboneShape) -> tuple[KeyIndex, ...] | None:
    """Index of the entries that each layer with attention reads in a cache written under a policy.

    `None` for other caches.
    """
    if not is_flow_cache(cache):
        return None
    found: list[KeyIndex | None]
    if shape.producers:
        held, producers = flow_layers(cache), dict(shape.producers)
        found = [held[producers.get(layer, layer)].seen_by(layer) for layer in sorted((*held, *producers))]
    else:
        found = [layer.index for layer in cache.layers if isinstance(layer, Indexed)]
    return None if None in found else cast("tuple[KeyIndex, ...]", tuple(found))


def note_padding(cache: Cache, real: Bool[Tensor, "batch tokens"]) -> None:
    """Record which of the tokens last appended to a cache are padding, those where `real` is false."""
    length, made = int(cache.get_seq_length()), dict[KeyIndex, KeyIndex]()
    for layer in flow_layers(cache).values():
        if layer.index is not None:
            if layer.index not in made:
                made[layer.index] = layer.index.upto(length, real)
            layer.index = made[layer.index]
            layer.each_shared(lambda seen: seen.upto(length, real))


def check_written_by(cache: Any, writer: Any, policy: str) -> None:
    """Raise `UnsupportedCall` for a cache written under another policy, or one whose layers do not fit each other."""
    _check_even(cache)
    if not is_flow_cache(cache):
        return
    if first_held(cache).written_by != writer:
        raise UnsupportedCall(
            f"{CACHE_ARGUMENT}: this cache was written under another policy than {policy!r}; continue under the policy "
            "it was written with, or start with a fresh cache"
        )


def _check_even(cache: Any) -> None:
    """Refuse layers that have seen different numbers of tokens or samples.

    As after a change that failed half-way, or where a caller made a new cache from the tensors of one of a policy.
    """
    if not isinstance(cache, Cache):
        return
    tokens: dict[int, int] = {}
    samples: dict[int, int] = {}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, FlowLayer):
            holds = layer.holds
            tokens[layer.length] = number
        else:
            holds = type(layer) is DynamicLayer and layer.is_initialized and layer.keys.dim() > 2
            if holds:
                tokens[layer.keys.shape[-2]] = number
        if holds:
            samples[len(layer.keys)] = number
    for what, found in (("tokens", tokens), ("samples", samples)):
        if len(found) > 1:
            (one, first), (other, last), *_ = found.items()
            raise UnsupportedCall(
                f"{CACHE_ARGUMENT}: {one} {what} in layer {first}, but {other} in layer {last}, as after a call or a "
                "crop that did not end, or in a cache made from the tensors of another one; start with a fresh cache, "
                "or empty this one by its `reset`"
            )


def seen_by(cache: Any) -> int:
    """Number of logical tokens a cache has seen; one host synchronisation for a static cache that has seen any."""
    return 0 if cache is None else int(cache.get_seq_length())


def counter_of(cache: Any) -> tuple[Tensor, Tensor] | None:
    """Two scalars whose sum is the number of logical tokens that a fixed static cache has seen; `None` for others."""
    first = first_held(cache)
    return (first.entries, first.lag) if isinstance(first, StaticFlowLayer) else None


def entries_of(layer: Any) -> int:
    """Number of entries that a cache layer holds; 0 for one without attention."""
    if not _has_entries(layer):
        return 0
    index = getattr(layer, "index", None)
    return int(layer.get_seq_length()) - (0 if index is None else index.length - len(index))


def keys_of(layer: Any) -> Tensor | None:
    """Keys (batch, kv_heads, entries, dim) that a cache layer holds; `None` if it holds none or no plain tensors."""
    entries, inner = entries_of(layer), layer.inner if isinstance(layer, UniformLayer) else layer
    if not entries or is_quantized(inner):
        return None
    keys: Tensor = inner.keys[:, :, :entries]
    return keys

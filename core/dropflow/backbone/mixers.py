"""What mixes the tokens of each decoder layer: attention, a recurrent state or a convolution, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dropflow.units import BackboneShape

MixerKind = Literal["attention", "recurrent", "none", "shared", "other"]
ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers with softmax attention over their own keys, for which dropping a token equals masking it."""
RECURRENT = frozenset({"linear_attention", "conv"})
"""Kinds of layers with a recurrent state or a causal convolution, for which a dropped token must be absent."""
WITHOUT_MIXER = frozenset({"moe", "mlp"})
"""Kinds of layers that treat every token alone."""
_RECURRENT_MODULES = frozenset({"linear_attn", "mamba", "short_conv", "mamba_mixer"})
"""Names of the modules of recurrent layers, for configs that do not list kinds of layers."""


@dataclass(frozen=True)
class Mixer:
    """What mixes the tokens of one decoder layer."""

    kind: MixerKind
    """`attention`; `recurrent`, a state or a convolution; `none`; `shared`, attention over the keys of another layer;
    `other`, what dropflow does not know."""
    name: str
    """The kind as the config names it, such as `sliding_attention`."""
    producer: int | None = None
    """The layer whose keys a `shared` layer reads."""


@dataclass(frozen=True)
class PlaceScale:
    """Decoder layers that scale a query by its place among the tokens of a call, which dropping tokens changes."""

    layers: tuple[int, ...]
    """Those layers, ascending."""
    tokens: int
    """The number of tokens, earlier ones included, from which on the scale is not 1 everywhere."""
    option: str
    """The entry of the config that switches the scale on."""

    @classmethod
    def of(cls, config: Any) -> PlaceScale | None:
        """The scale that a text decoder's transformers config states; `None` for none."""
        if not getattr(config, "attn_temperature_tuning", False) or not hasattr(config, "floor_scale"):
            return None
        rotating = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
        layers = tuple(number for number, rotates in enumerate(rotating[: config.num_hidden_layers]) if not rotates)
        return cls(layers, int(config.floor_scale), "attn_temperature_tuning") if layers else None


def windows_of(config: Any) -> dict[int, int]:
    """Tokens in the sliding window of each decoder layer that has one, from the transformers config.

    Where the config does not list kinds of layers, a window is that of all of them, as with Mistral.
    """
    window, depth = getattr(config, "sliding_window", None), config.num_hidden_layers
    if window is None:
        return {}
    names = getattr(config, "layer_types", None) or ["sliding_attention"] * depth
    return {number: int(window) for number, name in enumerate(names) if name == "sliding_attention"}


def mixers_of(config: Any, layers: Sequence[Any] = ()) -> tuple[Mixer, ...]:
    """The mixer of every layer of a text decoder, from its transformers config.

    `layers` are its modules, which tell recurrent layers apart where the config does not list kinds.
    """
    depth: int = config.num_hidden_layers
    names = list(getattr(config, "layer_types", None) or ())
    if len(names) != depth:
        names = [_named_by_modules(layer) for layer in layers] or ["full_attention"] * depth
    sharers = _sharers(config, depth)
    found: list[Mixer] = []
    for number, name in enumerate(names):
        if number in sharers:
            made = [i for i, other in enumerate(names[:number]) if other == name and i not in sharers]
            shares = name in ATTENTION and bool(made)
            found.append(Mixer("shared" if shares else "other", name, made[-1] if shares else None))
        else:
            found.append(Mixer(_kind(name), name))
    return tuple(found)


def shape_of(mixers: Sequence[Mixer], visual_tokens: int | None) -> BackboneShape:
    """The shape of a backbone with these decoder layers and this number of visual tokens per image."""
    attending = tuple(number for number, mixer in enumerate(mixers) if mixer.kind in ("attention", "shared"))
    producers = tuple((number, mixer.producer) for number, mixer in enumerate(mixers) if mixer.producer is not None)
    return BackboneShape(len(mixers), visual_tokens, None if len(attending) == len(mixers) else attending, producers)


def _kind(name: str) -> MixerKind:
    if name in ATTENTION:
        return "attention"
    if name in RECURRENT:
        return "recurrent"
    return "none" if name in WITHOUT_MIXER else "other"


def _named_by_modules(layer: Any) -> str:
    modules = {name.split(".")[-1] for name, _ in layer.named_modules()}
    return "linear_attention" if modules & _RECURRENT_MODULES else "full_attention"


def _sharers(config: Any, depth: int) -> frozenset[int]:
    """Layers that read the keys of an earlier layer of their kind."""
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return frozenset(number for number, mode in enumerate(modes) if mode and mode.startswith("reuse"))
    return frozenset(range(depth - (getattr(config, "num_kv_shared_layers", None) or 0), depth))

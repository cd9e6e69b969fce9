"""The policy that a served model's config names, checked before any weights are loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from dropflow import BackboneShape, EncodeOnly
from dropflow.errors import PolicyError, UnsupportedModel, escaped, nearest

FIELD = "dropflow"
"""Field of the config that names the policy; a model that records its policy has it there, too."""
KEYS = ("policy", "overrides")
HOST = "vLLM"
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Vision towers of LLaVA -> the strategy with which every row of their features is a patch."""
PERSISTENT_ROPE = "default"
"""Kind of rotary embedding whose table can be longer than the context."""


@dataclass(frozen=True)
class Served:
    """A policy as vLLM runs it on one model."""

    policy: EncodeOnly
    family: Literal["llava", "qwen2_5_vl"]
    """Whose positions and features the model has."""
    grid: tuple[int, int] | None = None
    """Patch grid of every image; `None` where images differ."""

    @property
    def persistent(self) -> bool:
        """Whether survivors keep the positions that they have in the whole prompt."""
        return self.policy.policy.positions == "persistent"

    def key(self, key: str) -> str:
        """The key of an image in vLLM's caches, which no other policy and no server without one has."""
        return hashlib.sha256(f"{key}\n{FIELD}:{self.policy.identity}".encode()).hexdigest()

    def tokens(self, grid: tuple[int, int]) -> int:
        """Placeholders of an image with this patch grid; raises `PolicyError` where none would be left."""
        count = self.policy.tokens(grid)
        if not count:
            raise PolicyError(
                f"policy {self.policy.policy.name!r}: leaves no token of an image of {grid[0]} x {grid[1]} patches, "
                "but vLLM has at least one placeholder for every image; keep more"
            )
        return count

    def advance(self, grid: tuple[int, int]) -> int:
        """Positions that an image takes up in the whole prompt."""
        return max(grid) if self.family == "qwen2_5_vl" else grid[0] * grid[1]


def served_llava(config: Any) -> Served:
    """The policy of a config shaped like LLaVA-1.5's.

    Raises `PolicyError` with every reason why it cannot run, and `UnsupportedModel` for a model whose image features
    are not one row per patch.
    """
    vision, layer, strategy = config.vision_config, config.vision_feature_layer, config.vision_feature_select_strategy
    if vision.model_type not in TOWERS:
        raise UnsupportedModel(
            f"vision_config: the vision tower is a {vision.model_type}, whose images the plug-in cannot take apart; "
            f"expected one of {', '.join(TOWERS)}"
        )
    if not isinstance(layer, int) or strategy != TOWERS[vision.model_type]:
        raise UnsupportedModel(
            f"vision_feature_layer: {layer}, with the strategy {strategy!r}, gives features that are not one row per "
            f"patch; expected one layer and {TOWERS[vision.model_type]!r}"
        )
    side = vision.image_size // vision.patch_size
    text = config.text_config
    policy = _policy(config, BackboneShape(text.num_hidden_layers, side * side), frozenset({"grid", "projector"}))
    found = Served(policy, "llava", (side, side))
    kind = dict(getattr(text, "rope_parameters", None) or {}).get("rope_type", PERSISTENT_ROPE)
    if found.persistent and kind != PERSISTENT_ROPE:
        raise PolicyError(
            f"positions: `persistent` needs a longer table of rotary embeddings than this model's, which are of the "
            f"type {kind!r}; write `positions: compact`, such as by the override `positions=compact`"
        )
    found.tokens((side, side))
    return found


def served_qwen(config: Any) -> Served:
    """The policy of a config shaped like Qwen2.5-VL's; raises as `served_llava` does."""
    text = getattr(config, "text_config", config)
    found = Served(_policy(config, BackboneShape(text.num_hidden_layers, None), frozenset({"grid"})), "qwen2_5_vl")
    if not found.persistent:
        raise PolicyError(
            "positions: `compact` renumbers one position per token, but this model's positions have several axes; "
            "leave it out"
        )
    return found


def _policy(config: Any, shape: BackboneShape, facts: frozenset[str]) -> EncodeOnly:
    source, overrides = _source(getattr(config, FIELD, None))
    written = json.dumps([source, list(overrides)], sort_keys=True)
    return _read(written, shape, facts)


@lru_cache(maxsize=32)
def _read(written: str, shape: BackboneShape, facts: frozenset[str]) -> EncodeOnly:
    """Read once what every request asks for."""
    source, overrides = json.loads(written)
    return EncodeOnly(source, shape, facts, overrides=overrides, host=HOST)


def _source(given: Any) -> tuple[str | Mapping[str, Any], Sequence[str]]:
    """Name, path or mapping of the policy, and its overrides."""
    if isinstance(given, str):
        return given, ()
    if isinstance(given, Mapping) and "stages" in given:
        return given, ()
    if isinstance(given, Mapping) and given:
        unknown = sorted(set(map(str, given)) - set(KEYS))
        if unknown:
            raise PolicyError(f"dropflow.{escaped(unknown[0])}: unknown key; {nearest(unknown[0], KEYS)}")
        policy, overrides = given.get("policy"), given.get("overrides", ())
        lists = isinstance(overrides, list | tuple) and all(isinstance(one, str) for one in overrides)
        if isinstance(policy, str | Mapping) and lists:
            return policy, overrides
    raise PolicyError(
        "dropflow: expected the name or path of a policy, the policy itself, or a mapping of `policy` and `overrides` "
        '(a list such as ["positions=compact"]); give it beside `architectures` in vLLM\'s `hf_overrides`'
    )

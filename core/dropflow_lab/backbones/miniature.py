"""Builds a model of any type in miniature: its config class with small sizes, and random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from dropflow_lab.backbones.sizes import COMMON, DECODER, OTHERS, OVERRIDES

Options = dict[str, Any]


def kinds() -> list[str]:
    """Every model type that transformers lists as turning images and text into text."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def class_name(kind: str) -> str:
    """Name of the model class of a type."""
    return str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind])


def miniature(kind: str) -> Any:
    """A model of type `kind` with six decoder layers, in eval mode; raises what its classes raise."""
    return getattr(transformers, class_name(kind))(small_config(kind)).eval()


def small_config(kind: str) -> PretrainedConfig:
    """The config of type `kind` with small sizes, which its default values get by name or its type by exception."""
    default = CONFIG_MAPPING[kind]()
    return type(default)(**_small(default, default.get_text_config(decoder=True), OVERRIDES.get(kind, {})))


def _small(config: PretrainedConfig, decoder: PretrainedConfig, own: Mapping[str, Any]) -> Options:
    inside = any(getattr(config, name, None) is decoder for name in config.sub_configs)
    own_sizes = DECODER if config is decoder else {**OTHERS, **DECODER} if inside else OTHERS
    sizes = {**COMMON, **own_sizes}
    stated = _stated(config)
    given: Options = {name: value for name, value in sizes.items() if _fits(name, value, stated)}
    given |= {name: 0.0 for name, rate in stated.items() if _is_rate(name, rate)}
    for name in config.sub_configs:
        part, more = getattr(config, name, None), own.get(name, {})
        if isinstance(part, PretrainedConfig) and "model_type" not in more:  # else another class of tower
            given[name] = {"model_type": part.model_type} | _small(part, decoder, more)
        elif more:
            given[name] = dict(more)
    return given | {name: value for name, value in own.items() if name not in config.sub_configs}


def _stated(config: PretrainedConfig) -> Options:
    """The fields of a config, with the defaults of those that differ by layer, which it cannot return."""
    return {**{field.name: field.default for field in fields(type(config))}, **vars(config)}


def _fits(name: str, value: Any, stated: Options) -> bool:
    """Whether a config takes this value: a number for a number, a list for a list, a token id for one left open."""
    default = stated.get(name)
    if default is None:
        return name in stated and name.endswith(("token_id", "token_index"))
    return isinstance(default, list | tuple if isinstance(value, list) else int) and not isinstance(default, bool)


def _is_rate(name: str, rate: Any) -> bool:
    """Whether a config field is a rate of dropout, under which no two runs in training are equal."""
    return isinstance(rate, float) and ("dropout" in name or "drop_path" in name)

"""What a model answers step by step on a static cache, and how `generate` compiles such steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from counted_graphs import Graphs, nothing_compiled
from tiny import policy, prompt
from torch import Tensor
from transformers import CompileConfig, StaticCache

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens import static_layers

TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
HIDROP = policy(
    inject={"use": "hidrop/late-injection", "at": 1},
    pyramid={"use": "hidrop/concave-pyramid", "keep": {1: 7}},
    exit={"use": "hidrop/early-exit", "at": 2},
)
"""Its three layers hold no visual token, seven, and none again; under `FASTV`, two hold all of them."""
FASTV = policy(rank={"use": "fastv/attention-rank", "at": 2, "keep": 5})


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """A counting backend, where nothing is compiled; capacities differ by single entries."""
    with nothing_compiled(), mock.patch.object(static_layers, "STRIDE", 1):
        yield Graphs()


def compiling(graphs: Graphs) -> dict[str, Any]:
    """Options of `generate` with which it compiles steps as a whole, on this machine, too."""
    config: Any = CompileConfig(fullgraph=True, backend=graphs, mode=None)
    config._compile_all_devices = True
    return {**TOKENS, "cache_implementation": "static", "compile_config": config}


def static(model: Any, limit: int = 64) -> StaticCache:
    """A static cache of `limit` tokens for the model."""
    return StaticCache(model.config.get_text_config(), max_cache_len=limit)


def asked(model: Any, cache: Any, step: Any = None, inputs: dict[str, Any] | None = None, count: int = 4) -> Tensor:
    """Logits (batch, steps, words) of `step`, by default the model's call, after a prompt: its best words are fed."""
    inputs = prompt() if inputs is None else inputs
    step, found = model if step is None else step, [model(**inputs, **{CACHE_ARGUMENT: cache}).logits[:, -1:]]
    mask = inputs["attention_mask"]
    if isinstance(cache, StaticCache):  # with a mask of fixed size, as `generate` makes it
        real = torch.nn.functional.pad(mask.bool(), (0, cache.layers[0].get_max_length() - mask.shape[1]))
    for number in range(count):
        length = inputs["input_ids"].shape[1] + number + 1
        ids = inputs["attention_mask"].sum(1, keepdim=True) + number
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, number + 1), value=1)
        if isinstance(cache, StaticCache):
            real[:, length - 1] = True
            mask = real[:, None, None].clone()
        word = found[-1].argmax(-1)
        found.append(step(input_ids=word, attention_mask=mask, position_ids=ids, **{CACHE_ARGUMENT: cache}).logits)
    return torch.cat(found, 1)

"""`auto` serves what has the usual shape, says what it cannot know, and refuses the rest with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import transformers
from unseen import UNSEEN

import dropflow
from dropflow import Stage
from dropflow.errors import PolicyError, UnsupportedModel
from dropflow.testing.families.tiny import IMAGE, TEXT, VISION
from dropflow.testing.probes import WINDOW, Ranked, policy
from dropflow_adapters.auto import Auto


def mllama() -> Any:
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 24,
        "patch_size": 6,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    )


def blip2() -> Any:
    former = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 16,
        "vocab_size": 30,
    }
    vision = {**VISION, "image_size": 24, "patch_size": 6}
    text = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "vocab_size": 99}
    text |= {"num_attention_heads": 2, "word_embed_proj_dim": 32}
    return transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config=vision, qformer_config=former, text_config=text, image_token_index=IMAGE, num_query_tokens=4
        )
    )


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=9)
    )


def gemma3n_like() -> Any:
    model = UNSEEN["deepseek_vl"].build()
    model.get_decoder().config.num_kv_shared_layers = 2
    return model


def indexed() -> Any:
    model = UNSEEN["deepseek_vl"].build()
    model.get_decoder().config.layer_types = ["full_attention"] * 2 + ["indexed_attention"] * 4
    return model


def language_model() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (mllama, r"'mllama', and `auto` cannot serve it: its decoder reads images by cross-attention"),
        (blip2, r"'blip-2', and `auto` cannot serve it: its own `generate` hands embeddings to a text model inside it"),
        (t5, r"'t5', and `auto` cannot serve it: it is an encoder-decoder"),
        (gemma3n_like, r"text decoder: layer 4 shares the keys of layer 3, but not through an argument"),
        (indexed, r"text decoder: layer 2 is of kind 'indexed_attention': its indexer keeps the best few keys"),
        (language_model, r"'llama', and `auto` cannot serve it: its core has no `get_image_features`"),
    ],
    ids=["cross-attention", "embeddings", "encoder-decoder", "shared keys", "indexed", "no vision"],
)
def test_a_model_of_another_shape_is_refused_with_the_reason(build: Callable[[], Any], reason: str) -> None:
    model = build()
    with pytest.raises(UnsupportedModel, match=reason):
        dropflow.attach(model, WINDOW)
    assert not model._forward_hooks


@pytest.mark.parametrize("fact", ["cls", "grid", "projector", "sublayers", "vision_layers"])
def test_a_stage_that_needs_what_cannot_be_known_is_refused(fact: str) -> None:
    class Needy(Ranked):
        needs: ClassVar[frozenset[str]] = frozenset({fact})

    model = UNSEEN["aria"].model()
    with pytest.raises(PolicyError, match=rf"stages\.needy: needs {fact}, which the adapter Auto cannot give"):
        dropflow.attach(model, policy(needy={"use": Needy}))


def test_a_stage_inside_the_encoder_is_refused() -> None:
    class Inside(Stage[Any]):
        @property
        def encode_at(self) -> tuple[int | None, ...]:
            return (1,)

        @dropflow.hookimpl
        def encode(self, call: Any) -> None: ...

    with pytest.raises(PolicyError, match=r"stages\.a: works inside the vision encoder, which this adapter cannot"):
        dropflow.attach(UNSEEN["aria"].model(), policy(a={"use": Inside}))


@torch.no_grad()
def test_a_type_without_an_adapter_gets_auto_by_itself() -> None:
    tiny = UNSEEN["cohere2_vision"]
    model, inputs = tiny.model(), tiny.prompt()[0]
    with dropflow.attach(model, WINDOW) as flow:
        model(**inputs)
        visual = flow.live() & (inputs["input_ids"] == IMAGE)
    assert visual.sum(2).tolist() == [[0, 0, 0], [9, 18, 0], [5, 10, 0], [5, 10, 0], [2, 4, 0], [0, 0, 0]]
    assert Auto(model).facts() == {"final_norm"}
    assert Auto(model).shape.visual_tokens is None

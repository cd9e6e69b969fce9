"""Kinds of layers that cannot run on fewer tokens are refused with the reason, which trying confirms."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers

import dropflow
from dropflow.backbone.mixers import Mixer, mixers_of
from dropflow.engine.attach import mixer_refusals, refusals
from dropflow.errors import UnsupportedModel
from dropflow.testing import MaskedOracle, Tiny
from dropflow.testing.case import relative_error
from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, square_pictures
from dropflow.testing.probes import policy
from dropflow_adapters.llava import Llava

CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
INDEXED: Mapping[str, Any] = {
    **TEXT,
    "model_type": "mistral_large4_text",
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "index_topk": 6,
    "index_head_dim": 8,
    "index_n_heads": 2,
}
BLOCKS: Mapping[str, Any] = {
    **TEXT,
    "model_type": "minimax_m3_vl_text",
    "head_dim": 8,
    "rotary_dim": 8,
    "layer_types": ["full_attention"] * 2 + ["minimax_m3_sparse"] * 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
}
DISTANCES: Mapping[str, Any] = {
    **TEXT,
    "model_type": "inkling_text",
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 11,
    "d_rel": 4,
    "rel_extent": 16,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "tie_word_embeddings": False,
}
DROPS = policy(a={"use": "control/random", "keep": {3: 0.4}, "seed": 3})


class LetThrough(Llava):
    """Takes any kind of layer for one with full attention."""

    token_arguments: ClassVar[Mapping[str, int]] = {"conv_mask": -1}

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Full attention in every layer."""
        return (Mixer("attention", "full_attention"),) * len(super().mixers)

    def projections(self, layer: Any) -> None:
        """Unknown."""


def tiny_of(text: Mapping[str, Any]) -> Tiny:
    """A LLaVA with this text decoder."""

    def build() -> Any:
        config = transformers.LlavaConfig(text_config=dict(text), vision_config=CLIP, image_token_index=IMAGE)
        return transformers.LlavaForConditionalGeneration(config)

    return Tiny(build, {"image": square_pictures(16, 16)})


REASONS = [
    (INDEXED, r"layer 0 is of kind 'indexed_attention': its indexer keeps the best 6 keys and breaks ties by slot"),
    (
        BLOCKS,
        r"layer 2 is of kind 'minimax_m3_sparse': its attention picks blocks of 4 neighbouring keys, and dropping",
    ),
    (DISTANCES, r"layer 0 is of kind 'hybrid_sliding': its attention counts distances by slot"),
]


has_indexer = pytest.mark.skipif(
    not hasattr(transformers, "MistralLarge4Config"), reason="the installed transformers has no such model"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(*REASONS[0], id="indexed", marks=has_indexer),
        pytest.param(*REASONS[1], id="blocks"),
        pytest.param(*REASONS[2], id="distances"),
    ],
)
def test_a_kind_that_cannot_be_served_is_refused_with_its_reason(text: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        dropflow.attach(tiny_of(text).model("eager"), DROPS)


def let_through(text: Mapping[str, Any]) -> float:
    """The error of a run without the refusal, against the masked run."""
    tiny = tiny_of(text)
    model, inputs = tiny.model("eager"), tiny.prompt([(3, "I", 8)])[0]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(refusals, "check_parameters", lambda *_: None)  # indices go from layer to layer
        with dropflow.attach(model, DROPS, adapter=LetThrough) as flow:
            logits, live = model(**inputs, use_cache=False).logits, flow.live()
        with MaskedOracle(model, live, LetThrough):
            expected = model(**inputs, use_cache=False).logits
    return relative_error(logits, expected)


@has_indexer
def test_without_the_refusal_indexed_attention_would_be_wrong() -> None:
    """Where keys outnumber those that the indexer keeps; where it keeps all of them, dropping is masking."""
    assert let_through(INDEXED) > 1e-3
    assert let_through({**INDEXED, "index_topk": 64}) < 1e-5


def test_without_the_refusal_distances_by_slot_would_be_wrong() -> None:
    assert let_through(DISTANCES) > 1e-3


def test_without_the_refusal_blocks_would_be_wrong_or_fail_inside_the_model() -> None:
    try:
        error = let_through(BLOCKS)
    except (IndexError, RuntimeError) as failure:
        frames = traceback.extract_tb(failure.__traceback__)
        assert "minimax_m3" in frames[-1].filename or "minimax_m3" in frames[-2].filename
    else:
        assert error > 1e-3


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("indexed_attention", {"index_topk": 2048}, r"its indexer keeps the best 2048 keys"),
        (
            "indexed_attention",
            {"index_topk": 2048, "index_kpool": 16},
            r"its attention picks blocks of 16 neighbouring",
        ),
        ("indexed_attention", {"indexer_compress_ratio": 4}, r"picks blocks of 4 neighbouring keys"),
        ("compressed_sparse_attention", {"compress_rates": {"compressed_sparse_attention": 4}}, r"blocks of 4 neigh"),
        ("hybrid", {}, r"it keeps keys and a recurrent state in one cache layer"),
        ("hybrid", {"rel_extent": 8}, r"its attention counts distances by slot"),
        ("reference_sliding_attention", {}, r"its cache drops generated tokens by itself"),
        ("of_next_year", {}, r"dropflow does not know what dropping a token changes"),
    ],
)
def test_the_reason_names_what_the_kind_does(kind: str, config: dict[str, Any], reason: str) -> None:
    model = tiny_of({**TEXT, "model_type": "llama"}).model()
    for name, value in {**config, "layer_types": ["full_attention"] * 4 + [kind] * 2}.items():
        setattr(model.get_decoder().config, name, value)
    with pytest.raises(UnsupportedModel, match=rf"layer 4 is of kind '{kind}': .*{reason}") as refusal:
        dropflow.attach(model, DROPS)
    assert kind == "hybrid" or "recurrent" not in str(refusal.value)


def test_a_sharer_without_a_producer_is_refused() -> None:
    model = tiny_of({**TEXT, "model_type": "llama"}).model()
    model.get_decoder().config.num_kv_shared_layers = 6
    with pytest.raises(UnsupportedModel, match=r"layer 0 .* shares the keys of an earlier layer .* there is none"):
        dropflow.attach(model, DROPS)


def test_every_known_kind_of_transformers_is_served_or_has_a_reason() -> None:
    from transformers.configuration_utils import ALLOWED_LAYER_TYPES

    config = SimpleNamespace(num_hidden_layers=len(ALLOWED_LAYER_TYPES), layer_types=ALLOWED_LAYER_TYPES)
    other = [mixer.name for mixer in mixers_of(config) if mixer.kind == "other"]
    unexplained = {kind for kind in other if "does not know" in mixer_refusals._reason(kind, config)}
    assert unexplained <= {"window_attention", "sparse", "dense"}, "kinds of towers and of feed-forward parts"

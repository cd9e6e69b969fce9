"""What tokens enter with late is what the first layer received, not the embeddings that the decoder was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GraniteConfig, LlavaConfig, LlavaForConditionalGeneration

from dropflow.testing import Tiny, square_pictures
from dropflow.testing.case import Case
from dropflow.testing.families.tiny import IMAGE, TEXT, VISION
from dropflow.testing.guarantees import check_drop_is_mask
from dropflow.testing.probes import WINDOW
from dropflow_adapters.llava import Llava


def granite() -> Any:
    """A LLaVA with Granite's decoder, which multiplies its input embeddings by 12 (Granite Vision)."""
    vision = {**VISION, "image_size": 24, "patch_size": 6, "model_type": "clip_vision_model"}
    text = GraniteConfig(**TEXT, embedding_multiplier=12.0, attention_multiplier=8**-0.5)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE))


CASE = Case("granite", Llava, Tiny(granite, {"image": square_pictures(24, 16)}), WINDOW)


def test_late_tokens_of_a_decoder_that_scales_embeddings_equal_the_masked_run() -> None:
    assert check_drop_is_mask(CASE) < 1e-5


@torch.no_grad()
def test_the_scale_is_one_that_a_wrong_entry_would_show() -> None:
    scaled = []
    layer = CASE.model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: scaled.append(args[0]))
    CASE.model(**CASE.inputs)
    handle.remove()
    embeds = CASE.model.get_input_embeddings()(CASE.inputs["input_ids"])
    text = CASE.inputs["input_ids"] != IMAGE
    assert scaled[0][text] == pytest.approx(12 * embeds[text])

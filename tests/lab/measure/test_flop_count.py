"""Counted FLOPs against the arithmetic."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from dropflow.backbone.flops import DecoderWidths, layer
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt
from dropflow_lab.measure.flop_count import count_flops


def test_a_product_of_matrices() -> None:
    assert count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


def test_fused_attention_on_a_cpu_is_counted_as_the_full_rectangle() -> None:
    query, key = torch.ones(1, 2, 7, 16), torch.ones(1, 2, 9, 16)
    assert count_flops(lambda: scaled_dot_product_attention(query, key, key)) == 2 * 2 * (2 * 7 * 9 * 16)


def test_a_decoder_agrees_with_the_closed_formula() -> None:
    shape = SubjectShape(layers=3, hidden=64, intermediate=96, heads=2, image_side=4, text_tokens=9, vocabulary=40)
    model, ids = build_model(shape), build_prompt(shape)["input_ids"] * 0
    widths = DecoderWidths(hidden=64, intermediate=96, heads=2, kv_heads=2, head_dim=32, vocabulary=40)
    with torch.no_grad():
        counted = count_flops(lambda: model.model.language_model(input_ids=ids))
    assert counted == 2 * 3 * layer(25, 25, widths)

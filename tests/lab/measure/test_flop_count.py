"""Counted FLOPs against the arithmetic."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from dropflow.backbone.flops import DecoderWidths, layer
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt
from dropflow_lab.measure.flop_count import count_flops, flops_of


def test_a_product_of_matrices() -> None:
    assert count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


def test_fused_attention_on_a_cpu_is_counted_as_the_full_rectangle() -> None:
    query, key = torch.ones(1, 2, 7, 16), torch.ones(1, 2, 9, 16)
    assert count_flops(lambda: scaled_dot_product_attention(query, key, key)) == 2 * 2 * (2 * 7 * 9 * 16)


def test_what_lies_above_the_diagonal_is_left_out_of_causal_attention_alone() -> None:
    query, key = torch.ones(1, 2, 9, 16), torch.ones(1, 1, 9, 16)
    rectangle = 2 * 2 * (2 * 9 * 9 * 16)
    causal = flops_of(lambda: scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True))
    assert (causal.full, causal.causal) == (rectangle, rectangle * (9 * 10 // 2) // 81)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    masked = flops_of(lambda: scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True))
    assert masked.full == masked.causal == rectangle


def test_the_backward_of_fused_attention_has_five_products_for_two() -> None:
    query = torch.ones(1, 2, 9, 16, requires_grad=True)
    forward = 2 * 2 * (2 * 9 * 9 * 16)
    both = flops_of(lambda: scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward())
    assert both.full == forward * 7 // 2
    assert both.causal == both.full * 45 // 81


def test_a_decoder_agrees_with_the_closed_formula() -> None:
    shape = SubjectShape(layers=3, hidden=64, intermediate=96, heads=2, image_side=4, text_tokens=9, vocabulary=40)
    model, ids = build_model(shape), build_prompt(shape)["input_ids"] * 0
    widths = DecoderWidths(hidden=64, intermediate=96, heads=2, kv_heads=2, head_dim=32, vocabulary=40)
    with torch.no_grad():
        counted = count_flops(lambda: model.model.language_model(input_ids=ids))
    assert counted == 2 * 3 * layer(25, 25, widths)

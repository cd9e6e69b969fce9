"""The reuse benchmark on a model of toy size: what it asks, what it counts, and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import dropflow
from dropflow_lab.bench import reuse
from dropflow_lab.bench.bare_layers import LayerShape, bare, shapes_in
from dropflow_lab.bench.random_llava import SHAPES, SubjectShape, build_model, build_prompt, twin
from dropflow_lab.bench.reuse import ReuseBench, bench_reuse
from dropflow_lab.measure.flop_count import count_flops

TOY = SubjectShape(layers=16, hidden=32, intermediate=64, heads=2, image_side=24, text_tokens=16, vocabulary=32)


@pytest.fixture(scope="module")
def measured() -> ReuseBench:
    return bench_reuse(TOY, questions=2)


def test_what_is_saved_is_what_the_prefix_ran(measured: ReuseBench) -> None:
    late, early, encodes = measured.rows
    assert [row.boundary for row in measured.rows] == [5, 1, 16]
    # encoded to 56: 8 tokens run through every layer instead of 8 + 56 + 8, next to vision and LM head
    assert 0 < early.flops_saved < late.flops_saved < encodes.flops_saved < 1
    # asked anew, attention is causal without a mask; after a prefix it has one, and counts whole
    assert 0 < encodes.causal_flops_saved < encodes.flops_saved
    entries, embeds = 16 * 2 * (8 + 56) * 32, (8 + 576) * 32
    assert encodes.prefix_bytes == 4 * (entries + embeds)


def test_efficiency_is_time_over_flops(measured: ReuseBench) -> None:
    for row in measured.rows:
        assert row.efficiency.median == pytest.approx(row.time_saved.median / row.flops_saved)
        assert row.causal_efficiency.median == pytest.approx(row.time_saved.median / row.causal_flops_saved)
        assert row.bare_efficiency.median == pytest.approx(row.bare_saved.median / row.flops_saved)
        for spread in (row.anew_seconds, row.again_seconds, row.making_seconds):
            assert 0 < spread.low <= spread.median <= spread.high
    assert (measured.clock, measured.questions) == ("cpu", 2)


def test_questions_of_a_batch_differ_in_length_and_begin_alike() -> None:
    first, second = reuse._questions(SubjectShape(batch=4, image_side=6, text_tokens=16), 2)
    assert first["attention_mask"].sum(1).tolist() == [8 + 36 + length for length in (8, 7, 5, 3)]
    rows = [ids[mask.bool()] for ids, mask in zip(first["input_ids"], first["attention_mask"], strict=True)]
    assert all(torch.equal(row[:44], rows[0][:44]) for row in rows)
    assert not torch.equal(first["input_ids"], second["input_ids"])


@torch.no_grad()
def test_bare_layers_do_the_work_of_the_call_alone() -> None:
    plain = build_model(TOY)
    model = twin(plain)
    first, _ = reuse._questions(TOY, 2)
    with dropflow.attach(model, "divprune-56") as flow:
        subject = reuse._Subject(model, flow, [first], build_prompt(TOY))
        runs = subject.runs(plain)
        anew, again = (shapes_in(model, runs[what]) for what in ("anew", "again"))
    assert anew == [LayerShape(1, 72, 72)] * 16
    assert again == [LayerShape(1, 8, 72)] * 16
    weights = 16 * (4 * 32 * 32 + 3 * 32 * 64)
    head = 2 * 32 * 32
    for shapes, tokens in ((anew, 72), (again, 8)):
        counted = count_flops(bare(plain, shapes, None))
        assert counted == 2 * tokens * weights + 16 * 4 * tokens * 72 * 32 + head


@torch.no_grad()
def test_bare_layers_under_the_contract_of_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_stand_in import registered

    small = replace(TOY, layers=2)
    shapes, seen = [LayerShape(1, 8, 72)] * 2, []
    with registered() as name:
        for attention in (name, "sdpa"):
            model = build_model(small)
            model.get_decoder().config._attn_implementation = attention
            monkeypatch.setattr(
                model.lm_head, "forward", lambda states, head=model.lm_head: seen.append(head.weight @ states[0, -1])
            )
            torch.manual_seed(0)
            bare(model, shapes, None)()
    torch.testing.assert_close(*seen)


def test_another_family() -> None:
    found = bench_reuse(SHAPES["tiny-qwen"], questions=2, policies=["hidrop-64", "divprune-56"])
    assert [row.boundary for row in found.rows] == [5, 16]
    assert all(0 < row.flops_saved < 1 for row in found.rows)


def test_command_as_json(cli: Any) -> None:
    told = json.loads(
        cli(
            "bench", "reuse", "--shape", "tiny", "--questions", 2, "--batch", 2, "--policies", "hidrop-64", "--json"
        ).stdout
    )
    (row,) = told["rows"]
    assert row["policy"] == "hidrop-64"
    assert set(row["efficiency"]) == {"median", "low", "high"}
    assert (told["questions"], told["subject"]["batch"], told["clock"]) == (2, 2, "cpu")


def test_command_as_a_table(cli: Any, refused: Any) -> None:
    of_one = ("--policies", "hidrop-64")  # all of them stand in `measured`
    shown = cli("bench", "reuse", "--shape", "tiny", "--visual-tokens", 64, "--quick", *of_one).stdout
    words = ("FLOPs saved", "time saved", "efficiency", "memory of the prefix", "64 visual and 8 text", "3 questions")
    assert all(word in shown for word in words)
    assert "expected a square number" in refused("bench", "reuse", "--visual-tokens", 65)

"""The efficiency benchmark on a model of toy size: its rows, what it counts, and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from measured import once

import dropflow
from dropflow_lab.bench import efficiency, random_llava
from dropflow_lab.bench.bare_layers import bare, shapes_in
from dropflow_lab.bench.efficiency import EfficiencyBench, bench_efficiency, ragged_prompt
from dropflow_lab.bench.engine import REDUCED
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.measure.flop_count import flops_of
from dropflow_lab.measure.machine import torch_threads

TOY = SubjectShape(layers=16, hidden=32, intermediate=64, heads=2, image_side=6, text_tokens=8, vocabulary=32)


@pytest.fixture(scope="module")
def measured() -> EfficiencyBench:
    with torch_threads(2):
        return bench_efficiency(TOY, (6, 12), rounds=2, threads=1)


def test_rows_are_sizes_by_policies(measured: EfficiencyBench) -> None:
    assert [(row.visual_tokens, row.policy) for row in measured.rows] == [
        (tokens, policy) for tokens in (36, 144) for policy in ("bench-reduced", "pyramiddrop")
    ]
    assert (measured.clock, measured.rounds, measured.subject.image_side, measured.machine.threads) == ("cpu", 2, 12, 1)


def test_each_ratio_is_over_the_flops_of_its_own_call(measured: EfficiencyBench) -> None:
    for row in measured.rows:
        assert 1 < row.flops_ratio < row.bare_flops_ratio  # ranking is work that bare layers lack
        assert row.efficiency.median == pytest.approx(row.speedup.median / row.flops_ratio)
        assert 1 < row.causal_flops_ratio < row.flops_ratio  # attention is a larger share of the longer call
        assert row.causal_efficiency.median == pytest.approx(row.speedup.median / row.causal_flops_ratio)
        assert row.bare_causal_efficiency.median > row.bare_efficiency.median
        assert 0 < row.bare_efficiency.low <= row.bare_efficiency.median <= row.bare_efficiency.high
        assert 0 < row.over_bare.low <= row.over_bare.median
    assert measured.rows[0].flops_ratio < measured.rows[2].flops_ratio


def test_flops_are_those_of_the_calls_alone() -> None:
    plain, inputs = build_model(TOY), build_prompt(TOY)
    model = twin(plain)
    with torch.no_grad(), dropflow.attach(model, REDUCED, overrides=["rescale=true"]):
        reduced = prefill_of(model, inputs)
        rows = efficiency._rows(TOY, {"bench-reduced": REDUCED}, 2, iter(range(1, 1000)).__next__)
        dense, fewer = flops_of(prefill_of(plain, inputs)), flops_of(reduced)
        assert rows[0].flops_ratio == dense.full / fewer.full
        assert rows[0].causal_flops_ratio == dense.causal / fewer.causal


def test_samples_of_a_batch_differ_in_length() -> None:
    mask = ragged_prompt(SubjectShape(batch=4, image_side=6, text_tokens=16))["attention_mask"]
    assert mask.sum(1).tolist() == [52, 50, 48, 46]
    assert mask[:, 6:].all()
    assert bench_efficiency(replace(TOY, batch=2), (6,), rounds=2).subject.batch == 2


@torch.no_grad()
def test_bare_layers_take_masks_where_samples_are_padded() -> None:
    plain, seen = build_model(TOY), []
    shapes = shapes_in(plain, prefill_of(plain, build_prompt(TOY)))
    plain.model.language_model.layers[3].register_forward_pre_hook(
        lambda *called: seen.append(called[2]["attention_mask"]), with_kwargs=True
    )
    bare(plain, shapes, None)()
    bare(plain, shapes, None, masked=True)()
    assert seen[0] is None
    assert torch.equal(seen[1][0, 0], torch.ones(44, 44, dtype=torch.bool).tril())


def test_command(cli, monkeypatch) -> None:
    monkeypatch.setattr(random_llava, "SubjectShape", lambda **given: replace(TOY, **given))
    monkeypatch.setattr(efficiency, "bench_efficiency", once(bench_efficiency))
    run = partial(cli, "bench", "engine", "--repeats", 2, "--visual-tokens")
    told = json.loads(run("16, 36", "--json").stdout)
    assert [row["visual_tokens"] for row in told["rows"]] == [16, 16, 36, 36]
    shown = run("16, 36").stdout
    assert all(word in shown for word in ("pyramiddrop", "time over bare", "batches of 1", "cpu time"))


def test_sizes_that_are_no_squares_are_refused(cli) -> None:
    for number, near in (("35", ", such as 25"), ("0", ""), ("a", "")):
        refused = cli("bench", "engine", "--visual-tokens", number)
        assert refused.exit_code == 2
        assert f"expected a square number{near}, got {number}" in " ".join(refused.output.replace("│", "").split())

"""`dropflow bench`, on models of toy size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from measured import once

from dropflow_lab.bench import decode, engine
from dropflow_lab.bench import stages as stage_bench
from dropflow_lab.bench import video as video_bench
from dropflow_lab.bench.random_llava import SubjectShape
from dropflow_lab.bench.random_qwen import QwenShape

TOY = SubjectShape(layers=16, hidden=32, intermediate=64, heads=2, image_side=6, text_tokens=8, vocabulary=32)
FEW = {
    name: stage_bench.POLICIES[name]
    for name in ("keep-all", "late injection at 8", "filter with budgets, then the cache")
}
TOY_ENGINE = once(partial(engine.bench_engine, TOY, decode_steps=2))
TOY_STAGES = once(partial(stage_bench.bench_stages, replace(TOY, layers=32, vision_hidden=64, vision_layers=3)))


@pytest.fixture
def toy_cli(cli, monkeypatch) -> Callable[..., object]:
    monkeypatch.setattr(engine, "bench_engine", TOY_ENGINE)
    monkeypatch.setattr(stage_bench, "POLICIES", FEW)
    monkeypatch.setattr(stage_bench, "bench_stages", TOY_STAGES)
    return cli


def test_json(toy_cli) -> None:
    result = toy_cli("bench", "engine", "--repeats", 2, "--threads", 1, "--json")
    told = json.loads(result.stdout)
    assert set(told["noop"]) == {"prefill_ratio", "decode_ratio"}
    assert set(told["reduced"]) == {"prefill_speedup", "flops_ratio", "efficiency", "kv_entries"}
    assert set(told["reduced"]["efficiency"]) == {"median", "low", "high"}
    assert set(told["machine"]) == {"cpu", "threads", "python", "torch", "transformers"}
    assert (told["rounds"], told["machine"]["threads"], len(told["reduced"]["kv_entries"])) == (2, 1, 16)


def test_table_of_a_quick_run(toy_cli) -> None:
    shown = toy_cli("bench", "engine", "--quick").stdout
    assert all(f"{name}: " in shown for name in ("noop", "empty", "control", "reduced"))
    assert "3 rounds on 1 thread(s)" in shown


def test_decode(cli, monkeypatch) -> None:
    monkeypatch.setattr(decode, "bench_decode", partial(decode.bench_decode, TOY, decode_steps=2))
    told = json.loads(cli("bench", "decode", "--repeats", 2, "--share", 0.5, "--json").stdout)
    assert (told["share"], told["rounds"], len(told["entries_read"]["late"])) == (0.5, 2, 16)
    shown = cli("bench", "decode", "--quick", "--wall").stdout
    assert all(name in shown for name in ("everything", "late", "early", "control", "entries read per layer", "wall"))


def test_stages_as_json(toy_cli) -> None:
    told = json.loads(toy_cli("bench", "stages", "--repeats", 2, "--json").stdout)
    assert [row["policy"] for row in told["rows"]] == list(told["policies"]) == list(stage_bench.POLICIES)
    assert set(told["rows"][0]) == {
        "stage",
        "policy",
        "selection_share_of_dense_prefill",
        "saving_share_of_dense_prefill",
        "largest_tensor",
    }
    assert set(told["rows"][0]["saving_share_of_dense_prefill"]) == {"median", "low", "high"}
    assert (told["rounds"], told["square_map"], told["subject"]["layers"]) == (2, (36 + 8) ** 2, 32)


def test_stages_as_a_table(toy_cli) -> None:
    shown = toy_cli("bench", "stages", "--repeats", 2).stdout
    assert all(word in shown for word in ("control", "hidrop", "mustdrop", "selection", "saving", "largest"))
    assert "would hold 1936 elements" in shown
    assert "2 rounds on 1 thread(s)" in shown


def test_video(cli, monkeypatch) -> None:
    video = replace(QwenShape(), hidden=64, intermediate=96, heads=2, vocabulary=64, side=4, text_tokens=8)
    page = replace(video, layers=1, frames=0, vision_layers=1)
    monkeypatch.setattr(video_bench, "bench_video", once(partial(video_bench.bench_video, video, page)))
    few = ("EVS at 25 %", "every fourth time step")
    monkeypatch.setattr(video_bench, "VIDEO_POLICIES", {name: video_bench.VIDEO_POLICIES[name] for name in few})
    told = json.loads(cli("bench", "video", "--repeats", 2, "--json").stdout)
    assert [row["policy"] for row in told["rows"]] == list(few)
    assert [row["policy"] for row in told["encoder"]] == ["PixelPrune", "PixelPrune's baseline"]
    assert told["rows"][0]["entry_share"] == 0.25
    shown = cli("bench", "video", "--repeats", 2).stdout
    assert all(word in shown for word in ("evs", "control", "pixelprune", "efficiency", "selection"))
    assert "2 rounds on 1 thread(s)" in shown

"""`dropflow bench train` and `dropflow bench gpu`, on a tiny shape on the CPU."""

from __future__ import annotations

import json
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import once

from dropflow_lab.bench import gpu, train
from dropflow_lab.bench.compiled_steps import CompiledBench, bench_compiled
from dropflow_lab.bench.random_llava import SubjectShape
from dropflow_lab.measure.machine import this_machine
from dropflow_lab.measure.timing import Spread

TINY = ("--shape", "tiny", "--batch", 1, "--repeats", 2)


TOY_TRAIN = once(train.bench_train)


def test_train_as_json(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "bench_train", TOY_TRAIN)
    told = json.loads(cli("bench", "train", *TINY, "--json").stdout)
    assert set(told["step_speedup"]) == set(told["efficiency"]) == {"median", "low", "high"}
    assert told["flops_ratio"] > 1
    assert told["peak_memory_ratio"] > 1
    assert told["policy"]["name"] == "hidrop-64"
    assert (told["rounds"], told["subject"]["layers"], told["subject"]["batch"]) == (2, 16, 1)


def test_train_as_a_table(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "bench_train", TOY_TRAIN)
    shown = cli("bench", "train", *TINY, "--quick").stdout
    assert all(word in shown for word in ("step speed-up", "FLOPs ratio", "peak memory ratio", "efficiency"))
    assert "2 rounds, cpu time, on 1 thread(s)" in shown


def test_gpu_runs_anywhere_and_writes_its_table(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps are the slow set's, on this command, and those of `dropflow bench compiled`."""

    def compiled(shape: SubjectShape, **options: Any) -> CompiledBench:
        signature(bench_compiled).bind(shape, **options)
        spreads = {field.name: Spread(1.0, 1.0, 1.0) for field in fields(CompiledBench) if field.type == "Spread"}
        known = {"graphs": 1, "capacities": (), "backend": options["backend"], "clock": "wall"}
        return CompiledBench(**spreads, **known, rounds=options["rounds"], subject=shape, machine=this_machine())

    monkeypatch.setattr(gpu, "bench_compiled", compiled)
    out = tmp_path / "docs" / "gpu.md"
    shown = cli("bench", "gpu", *TINY, "--device", "cpu", "--dtype", "bfloat16", "--out", out).stdout
    assert "cpu, sdpa: prefill" in shown
    page = out.read_text()
    assert "`dropflow bench gpu --shape tiny --batch 1 --device cpu --dtype bfloat16 --repeats 2`" in page
    trained, decoded, compiled, *reused = [line for line in page.splitlines() if line.startswith("| sdpa |")]
    speedup = trained.split("|")[4].strip()
    assert f"speed-up {speedup}; training step" in shown
    assert decoded.split("|")[-2].strip() == "- / -"  # no GPU, no host synchronisations
    assert compiled.split("|")[-2].strip() == "1"  # one graph
    assert [row.split("|")[2].strip() for row in reused] == ["`hidrop-64`", "`fastv-k2-r50`", "`divprune-56`"]
    assert f"selection {decoded.split('|')[7].strip()}; host" in shown


@pytest.mark.slow
def test_gpu_in_the_shape_of_qwen(cli) -> None:
    told = json.loads(
        cli(
            "bench", "gpu", "--shape", "tiny-qwen", *TINY[2:], "--device", "cpu", "--dtype", "bfloat16", "--json"
        ).stdout
    )
    (row,) = told["rows"]
    assert row["train"]["flops_ratio"] > 1
    assert [one["boundary"] for one in row["reuse"]] == [5, 1, 16]
    assert row["compiled"]["graphs"] == 1
    assert row["inference"]["policy_host_syncs"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_one_is_refused(refused) -> None:
    assert "torch sees no CUDA device" in refused("bench", "gpu", *TINY)


def test_what_torch_does_not_have_is_refused_in_one_line(refused, tmp_path) -> None:
    assert "--device: expected a device of torch" in refused("bench", "train", *TINY, "--device", "nosuch")
    assert "--attention foo: " in refused("bench", "train", *TINY, "--attention", "foo")
    line = refused("bench", "compiled", "--backend", "inducto")
    assert "--backend: no backend of torch.compile named 'inducto'; did you mean 'inductor'?" in line
    (tmp_path / "taken").touch()
    assert "is not a writable folder" in refused("bench", "gpu", *TINY, "--out", tmp_path / "taken" / "page.md")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("bench", ["train", "reuse"])
def test_a_gpu_that_is_not_there_is_refused(refused, bench) -> None:
    assert "torch sees no CUDA device" in refused("bench", bench, "--shape", "tiny", "--quick", "--device", "cuda")

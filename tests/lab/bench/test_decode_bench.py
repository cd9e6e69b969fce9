"""The decode benchmark on a model of toy size: its variants, and what they read."""

from __future__ import annotations

import pytest

from dropflow_lab.bench.decode import DecodeBench, bench_decode
from dropflow_lab.bench.random_llava import SubjectShape

TOY = SubjectShape(layers=16, hidden=32, intermediate=64, heads=2, image_side=10, text_tokens=8, vocabulary=32)


@pytest.fixture(scope="module", params=[False, True], ids=["cpu", "wall"])
def measured(request: pytest.FixtureRequest) -> DecodeBench:
    return bench_decode(TOY, rounds=2, decode_steps=2, wall=request.param)


def test_steps_read_a_share_from_their_layer_on(measured: DecodeBench) -> None:
    text = (
        8 + 2 * (2 + 1) + 1
    )  # the prompt's, two steps in two rounds and a warm-up round, and the step that is counted
    assert measured.entries_read == {
        "everything": (text + 100,) * 16,
        "late": (text + 100,) * 8 + (text + 5,) * 8,
        "early": (text + 100,) * 2 + (text + 5,) * 14,
    }


def test_it_is_plain_data(measured: DecodeBench) -> None:
    told = measured.to_json()
    assert set(told["early"]) == {"median", "low", "high"}
    assert told["rounds"] == 2
    assert told["machine"]["threads"] == 1
    assert told["clock"] in ("wall", "CPU time of the process")

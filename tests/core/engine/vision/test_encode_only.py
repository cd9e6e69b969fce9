"""Stages that encode, for programs that run the model themselves: the engine's rows, counts known before, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import IMAGE, prompt, tiny_llava
from torch import nn

import dropflow
from dropflow import (
    BackboneShape,
    Budget,
    CacheCall,
    Encode,
    EncodeCall,
    EncodeOnly,
    Forecast,
    Keep,
    PruneCall,
    Stage,
    hookimpl,
)
from dropflow.errors import DecisionError, PolicyError

SHAPE = BackboneShape(12, 144)
FACTS = frozenset({"grid", "projector"})
SUBSETS = {
    "divprune": {"use": "divprune/max-min", "keep": 0.4},
    "random": {"use": "control/random", "encode": 0.4},
    "scope": {"use": "scope/saliency-coverage", "keep": 0.4, "alpha": 0},
    "pool": {"use": "control/pool"},
}


def made(
    stages: dict[str, Any], shape: BackboneShape = SHAPE, facts: frozenset[str] = FACTS, **rest: Any
) -> EncodeOnly:
    return EncodeOnly({"name": "p", "stages": stages, **rest}, shape, facts, host="the server")


@torch.no_grad()
@pytest.mark.parametrize("name", SUBSETS)
def test_rows_are_those_that_the_engine_keeps(name: str) -> None:
    model = tiny_llava()
    inputs = prompt([(3, "I", 5)])
    with dropflow.attach(model, {"name": "p", "stages": {"s": SUBSETS[name]}}) as flow:
        model(**inputs)
        live = flow.live()[0, 0, inputs["input_ids"][0] == IMAGE]
        shape = BackboneShape(6, len(live))
    side = int(len(live) ** 0.5)
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    features = tower.hidden_states[model.config.vision_feature_layer][0, 1:]
    only = made({"s": SUBSETS[name]}, shape)
    (image,) = only.reduce([features], [(side, side)], model.model.multi_modal_projector, prefix=1)
    assert image.places.tolist() == live.nonzero()[:, 0].tolist()
    assert len(image.rows) == only.tokens((side, side)) == int(live.sum())
    if name != "pool":
        torch.testing.assert_close(image.rows, model.model.multi_modal_projector(features)[live])


def test_images_of_one_call_are_reduced_each_for_itself() -> None:
    only = made({"s": SUBSETS["divprune"]}, BackboneShape(12, None))
    dice = torch.Generator().manual_seed(0)
    features, grids = [torch.randn(n, 8, generator=dice) for n in (12, 30)], [(3, 4), (5, 6)]
    together = only.reduce(features, grids)
    alone = [only.reduce([own], [grid])[0] for own, grid in zip(features, grids, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.places, other.places)
        assert torch.equal(one.rows, other.rows)
    assert [len(one.rows) for one in together] == [only.tokens(grid) for grid in grids] == [5, 12]
    assert only.reduce([], []) == []


@pytest.mark.parametrize(("grid", "count"), [((4, 4), 4), ((5, 3), 6), ((1, 7), 4)])
def test_a_pools_tokens_follow_from_the_grid(grid: tuple[int, int], count: int) -> None:
    only = made({"s": {"use": "control/pool"}})
    assert only.tokens(grid) == count
    assert len(only.reduce([torch.randn(grid[0] * grid[1], 4)], [grid])[0].rows) == count


def test_stages_work_one_after_another() -> None:
    only = made({"pool": {"use": "control/pool"}, "few": {"use": "divprune/max-min", "keep": 0.5}})
    assert only.tokens((8, 8)) == 8
    assert len(only.reduce([torch.randn(64, 4)], [(8, 8)])[0].rows) == 8


def test_the_identity_is_that_of_the_policy_and_the_shape() -> None:
    known = made({"s": SUBSETS["divprune"]})
    assert known.identity == made({"s": SUBSETS["divprune"]}).identity
    others = [
        made({"s": {**SUBSETS["divprune"], "keep": 0.5}}),
        made({"s": SUBSETS["divprune"]}, positions="compact"),
        made({"s": SUBSETS["divprune"]}, BackboneShape(13, 144)),
        made({"s": SUBSETS["random"]}),
        made({"s": {**SUBSETS["random"], "seed": 1}}),
    ]
    assert len({known.identity, *(other.identity for other in others)}) == 6


class Asking(Stage[Any]):
    reads_questions = True  # type: ignore[assignment]

    def forecast(self) -> Forecast:
        return Forecast(encoded=Budget(tokens=3))

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        return Encode(keep=tuple(places < 3 for places in call.places))


class Filming(Asking):
    reads_questions = False  # type: ignore[assignment]
    reads_videos = True  # type: ignore[assignment]


class Learning(Asking):
    reads_questions = False  # type: ignore[assignment]

    def build_module(self, backbone: Any) -> nn.Module:  # noqa: ARG002  # the engine names it
        return nn.Linear(1, 1)


class Preparing(Asking):
    reads_questions = False  # type: ignore[assignment]

    def prepare(self, backbone: Any) -> None:
        pass


class Needy(Asking):
    reads_questions = False  # type: ignore[assignment]
    needs = frozenset({"rotary"})


class Guessing(Asking):
    reads_questions = False  # type: ignore[assignment]

    def forecast(self) -> Forecast:
        return Forecast(encoded="data")


class Protecting(Asking):
    reads_questions = False  # type: ignore[assignment]

    def forecast(self) -> Forecast:
        return Forecast(protected=Budget(tokens=2))


class Soft(Stage[Any]):
    differentiable = True  # type: ignore[assignment]
    prune_at = (2,)  # type: ignore[assignment]

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        return Keep(call.valid)


class Evicting(Stage[Any]):
    @hookimpl
    def decode_cache(self, call: CacheCall) -> None:  # pluggy names it
        """Leave it as it is."""


ALONE = "run this policy on transformers, or use stages that encode alone"


@pytest.mark.parametrize(
    ("stages", "lines"),
    [
        ({"s": {"use": "vtw/withdrawal", "at": 6}}, ["decides at which layer vision leaves the LLM"]),
        ({"s": {"use": "hidrop/late-injection", "at": 3}}, ["decides at which layer vision enters the LLM"]),
        ({"s": {"use": "fastv/attention-rank"}}, ["drops tokens at layers of the LLM"]),
        ({"s": {"use": Soft}}, ["drops tokens at layers of the LLM"]),
        ({"s": {"use": Evicting}}, ["edits the KV cache"]),
        ({"s": {"use": "control/random", "encode": 9, "place": 1}}, ["works at boundary 1 of the vision tower"]),
        ({"s": {"use": "control/random", "encode": 9, "place": "pixels"}}, ["works on pixels"]),
        ({"s": {"use": "scope/saliency-coverage"}}, ["reads the attention of the vision tower"]),
        ({"s": {"use": Asking}}, ["reads the question"]),
        ({"s": {"use": Filming}}, ["works on videos"]),
        ({"s": {"use": Learning}}, ["has a trained module"]),
        ({"s": {"use": Preparing}}, ["prepares itself from a model of transformers"]),
        ({"s": {"use": Needy}}, ["needs rotary, which the server does not show"]),
        ({"s": {"use": Guessing}}, ["leaves as many tokens as the content of an image decides"]),
        (
            {"s": {"use": "prumerge/prune-merge"}},
            ["reads the attention", "needs cls", "leaves as many tokens as the content of an image decides"],
        ),
        (
            {"s": {"use": "vtw/withdrawal", "at": 6}, "t": {"use": Guessing}},
            ["decides at which layer vision leaves", "leaves as many tokens"],
        ),
    ],
)
def test_every_reason_is_said_when_the_policy_is_read(stages: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(PolicyError) as caught:
        made(stages)
    told = str(caught.value).split("\n")
    assert len(told) == len(lines)
    for line, expected in zip(told, lines, strict=True):
        assert line.split(": ", 1)[0] in {f"stages.{name}" for name in stages}
        assert line.split(": ", 1)[1].startswith(expected)
        assert ";" in line
        assert "the server" in line
        assert ALONE in line or "choose" in line


@pytest.mark.parametrize("first", [SUBSETS["divprune"], {"use": Protecting}], ids=["reduced", "protected"])
def test_stages_whose_number_of_tokens_is_unknown_together(first: dict[str, Any]) -> None:
    second = {"use": "control/pool"} if first is SUBSETS["divprune"] else SUBSETS["divprune"]
    with pytest.raises(PolicyError, match="together, how many tokens these leave"):
        made({"a": first, "b": second})


def test_the_projectors_input_is_refused_where_there_is_none() -> None:
    stage = {"use": "scope/saliency-coverage", "keep": 0.4, "alpha": 0, "at": "features"}
    with pytest.raises(PolicyError, match="write `at: output`"):
        made({"s": stage}, facts=frozenset({"grid"}))
    left = {name: value for name, value in stage.items() if name != "at"}
    assert made({"s": left}, facts=frozenset({"grid"})).tokens((5, 5)) == 10


def test_stages_that_keep_everything_may_stay() -> None:
    assert made({"s": {"use": "control/keep-all"}}).tokens((12, 12)) == 144


def keeping(count: int) -> Callable[[Any, EncodeCall], Encode]:
    @hookimpl
    def encode(self: Any, call: EncodeCall) -> Encode:  # noqa: ARG001  # a method
        return Encode(keep=tuple(places < count for places in call.places))

    return encode


def test_a_wrong_forecast_is_found() -> None:
    wrong = type("Wrong", (Preparing,), {"encode": keeping(4), "prepare": Stage.prepare})
    with pytest.raises(DecisionError, match="4 tokens are left of image 0, but the server has counted 3"):
        made({"s": {"use": wrong}}).reduce([torch.randn(9, 4)], [(3, 3)])


def test_the_tower_shows_nothing() -> None:
    class Peeping(Protecting):
        def forecast(self) -> Forecast:
            return Forecast(encoded=Budget(tokens=3))

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            call.received_attention(1)
            return Encode()

    with pytest.raises(DecisionError, match=r"stages\.s: vision layer 1: the server does not give away"):
        made({"s": {"use": Peeping}}).reduce([torch.randn(9, 4)], [(3, 3)])

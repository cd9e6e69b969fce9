"""What `explain` says of a mixture is what a model then does, or is left open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import policy, prompt, tiny_llava

import dropflow
from dropflow import Encode, EncodeCall, Stage, hookimpl
from dropflow.errors import DecisionError, PolicyError
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape

KEYS = {"use": "mustdrop/key-set", "share": 0.3}  # ceil(0.3 * 16) = 5
DIVERSE = {"use": "divprune/max-min", "keep": 6}
HALF = {"use": "divprune/max-min", "keep": 0.5}
MERGED = {"use": "visionzip/dominant-contextual", "dominant": 8, "contextual": 2}
POOL = {"use": "control/pool", "window": [2, 2]}


def pyramid(**keep: int | float) -> dict[str, Any]:
    return {"use": "hidrop/concave-pyramid", "keep": {int(at[1:]): tokens for at, tokens in keep.items()}}


MIXTURES: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "shares of what the stage before left": ({"a": HALF, "b": HALF}, (4,) * 6),
    "the order of acting, not of the file": ({"d": DIVERSE, "v": MERGED}, (6,) * 6),
    "a share of rows that the data decides": ({"p": POOL, "d": HALF}, (None,) * 6),
    "protected tokens outlive": ({"k": KEYS, "p": pyramid(b2=7, b4=3)}, (16, 16, 7, 7, 5, 5)),
    "encoding after protection": ({"k": KEYS, "d": DIVERSE}, (None,) * 6),
    "a share of what entered": ({"d": DIVERSE, "p": pyramid(b3=0.5)}, (6, 6, 6, 3, 3, 3)),
    "two stages at a boundary": (
        {"p": pyramid(b3=7), "r": {"use": "control/random", "keep": {3: 7}}},
        (16, 16, 16, None, None, None),
    ),
}


@pytest.mark.parametrize(("stages", "forecast"), MIXTURES.values(), ids=MIXTURES)
@torch.no_grad()
def test_a_mixture_does_what_was_forecast(stages: dict[str, Any], forecast: tuple[int | None, ...]) -> None:
    model = tiny_llava()
    with dropflow.attach(model, policy(**stages)) as flow:
        model(**prompt([(3, "I", 5)]))
        said, done = flow.plan.schedule(), flow.report()
    assert said.per_layer == forecast
    for told, layer in zip(said.per_layer, done.layers, strict=True):
        assert told in (None, layer.visual_tokens)
    assert said.entry in (None, done.entry_visual_tokens)


def test_a_keep_above_what_the_encode_stages_leave_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"stages\.p\.keep\.2: keeps 9 visual tokens, more than the 6 left by the en"):
        resolve(dropflow.load_policy(policy(d=DIVERSE, p=pyramid(b2=9))), BackboneShape(6, 16))


def test_a_fault_names_an_option_only_where_the_stage_has_it() -> None:
    stages = {"d": {"use": "dart/duplication", "keep": 4}, "p": pyramid(b3=9)}
    with pytest.raises(PolicyError, match=r"^stages\.p\.keep\.3: keeps 9 .* the 4 left by stages\.d\.keep; "):
        resolve(dropflow.load_policy(policy(**stages)), BackboneShape(6, 16))


def test_rescaled_keeps_count_the_whole_image_also_behind_encode_stages() -> None:
    tuned = {"tuned_for": {"layers": 12, "visual_tokens": 64}, "rescale": True}
    plan = resolve(
        dropflow.load_policy(policy(d={"use": "divprune/max-min", "keep": 24}, p=pyramid(b4=12)) | tuned),
        BackboneShape(6, 16),
    )
    assert plan.schedule().per_layer == (6, 6, 3, 3, 3, 3)


@torch.no_grad()
def test_what_a_stage_cannot_read_names_the_stage() -> None:
    class Untold(Stage[Any]):
        """Merges pairs of rows, and does not say which."""

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            rows = tuple((own[::2] + own[1::2]) / 2 for own in call.features)
            return Encode(rows=rows, places=tuple(places[::2] for places in call.places))

    model = tiny_llava()
    both = policy(v={"use": Untold}, again={"use": "mustdrop/key-set", "share": 0.5})
    merged = pytest.raises(
        DecisionError, match=r"^stages\.again: attention of the vision encoder: stages\.v has merged"
    )
    with dropflow.attach(model, both), merged:
        model(**prompt([(3, "I", 5)]))


def test_a_stage_that_is_no_mapping_is_told_so() -> None:
    with pytest.raises(PolicyError, match=r"^stages\.p: expected a mapping, got 'hidrop/early-exit'$"):
        dropflow.load_policy({"name": "x", "stages": {"p": "hidrop/early-exit"}})

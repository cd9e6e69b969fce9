"""Which policies a model in vLLM is served with, read without vLLM, and how its config names them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from documents import blocks

from dropflow.errors import PolicyError, UnsupportedModel
from dropflow_vllm import served_llava, served_qwen

DIVPRUNE = {"name": "d", "stages": {"d": {"use": "divprune/max-min", "keep": 0.25}}}


def llava(policy: Any = None, tower: str = "clip_vision_model", rope: str = "default", **fields: Any) -> Any:
    """A config shaped like LLaVA-1.5's."""
    vision = SimpleNamespace(model_type=tower, image_size=336, patch_size=14)
    text = SimpleNamespace(num_hidden_layers=32, rope_parameters={"rope_type": rope, "rope_theta": 1e4})
    given: dict[str, Any] = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **fields}
    named = {} if policy is None else {"dropflow": policy}
    return SimpleNamespace(model_type="llava", vision_config=vision, text_config=text, **given, **named)


def qwen(policy: Any) -> Any:
    text = SimpleNamespace(num_hidden_layers=28)
    return SimpleNamespace(model_type="qwen2_5_vl", text_config=text, dropflow=policy)


def compact(policy: dict[str, Any]) -> dict[str, Any]:
    return {**policy, "positions": "compact"}


def test_a_config_names_a_policy_in_four_ways() -> None:
    plain = served_llava(llava("divprune-56"))
    assert plain.grid == (24, 24)
    assert plain.tokens((24, 24)) == 56
    assert not plain.persistent  # as published
    assert served_llava(llava({"policy": "divprune-56"})).key("k") == plain.key("k")
    fewer = served_llava(
        llava({"policy": "divprune-56", "overrides": ["stages.diverse.keep=0.1", "positions=persistent"]})
    )
    assert fewer.tokens((24, 24)) == 58
    assert fewer.persistent
    assert served_llava(llava(DIVPRUNE)).tokens((24, 24)) == 144
    assert served_llava(llava({"policy": DIVPRUNE})).key("k") == served_llava(llava(DIVPRUNE)).key("k")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "dropflow: expected the name or path of a policy"),
        ({}, "dropflow: expected the name or path"),
        (7, "dropflow: expected the name or path"),
        ({"policy": "divprune-56", "overrides": "positions=compact"}, "a list such as"),
        ({"policy": "divprune-56", "override": []}, "dropflow.override: unknown key; did you mean 'overrides'"),
        ("divprune-57", "divprune-57: no such policy; did you mean 'divprune-56'"),
        ("hidrop-64", "stages.inject: decides at which layer vision enters the LLM, which vLLM leaves to nobody"),
        ("scope-64", "stages.cover: reads the attention of the vision tower, which vLLM does not give away"),
        ("prumerge", "leaves as many tokens as the content of an image decides, but vLLM counts placeholders"),
        ("evs-70", "stages.evs: works on videos, but vLLM reduces pictures alone"),
        ("cdpruner-64", "stages.dpp: drops tokens at layers of the LLM, but in vLLM all layers have the same ones"),
        ("visionselector-20", "stages.selector: has a trained module, whose weights vLLM does not load"),
        ({"name": "n", "stages": {"n": {"use": "control/stride", "encode": 0}}}, "leaves no token of an image of 24"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(given: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        served_llava(llava(given))


def test_llavas_of_other_shapes() -> None:
    assert (
        served_llava(llava(DIVPRUNE, "siglip_vision_model", vision_feature_select_strategy="full")).tokens((24, 24))
        == 144
    )
    for fields in ({"vision_feature_layer": [-2, -5]}, {"vision_feature_select_strategy": "full"}):
        with pytest.raises(UnsupportedModel, match="gives features that are not one row per patch"):
            served_llava(llava(DIVPRUNE, **fields))
    with pytest.raises(UnsupportedModel, match="the vision tower is a pixtral"):
        served_llava(llava(DIVPRUNE, "pixtral"))


def test_positions_that_a_model_cannot_have() -> None:
    with pytest.raises(PolicyError, match="of the type 'llama3'; write `positions: compact`"):
        served_llava(llava(DIVPRUNE, rope="llama3"))
    assert not served_llava(llava(compact(DIVPRUNE), rope="llama3")).persistent
    with pytest.raises(PolicyError, match="this model's positions have several axes; leave it out"):
        served_qwen(qwen(compact(DIVPRUNE)))


def test_images_of_qwen_differ_in_size() -> None:
    found = served_qwen(qwen(DIVPRUNE))
    assert found.grid is None
    assert [found.tokens(grid) for grid in ((4, 6), (10, 10))] == [6, 25]
    assert [found.advance(grid) for grid in ((4, 6), (10, 10))] == [6, 10]
    assert served_llava(llava(DIVPRUNE)).advance((24, 24)) == 576
    with pytest.raises(PolicyError, match="leaves no token of an image of 1 x 1 patches"):
        found.tokens((1, 1))
    with pytest.raises(PolicyError, match="the absolute number 56 was tuned for 576 visual tokens"):
        served_qwen(
            qwen(
                {
                    "name": "d",
                    "tuned_for": {"layers": 28, "visual_tokens": 576},
                    "stages": {"d": {"use": "divprune/max-min", "keep": 56}},
                }
            )
        )


def test_the_keys_of_two_policies_differ() -> None:
    policies = [DIVPRUNE, compact(DIVPRUNE), "divprune-56", {"name": "d", "stages": {"d": {"use": "control/pool"}}}]
    keys = {served_llava(llava(policy)).key("an image") for policy in policies}
    assert len(keys | {"an image"}) == 5
    assert served_llava(llava(DIVPRUNE)).key("another") not in keys
    assert served_qwen(qwen(DIVPRUNE)).key("an image") not in keys


def test_the_example_of_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("docs/vllm.md", "python")
    exec(code.text, {})
    (expected,) = [block.text for block in blocks("docs/vllm.md") if block.title == "output"]
    assert capsys.readouterr().out == expected

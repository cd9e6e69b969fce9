"""Prefixes where a model makes the embeddings of the tokens that enclose an image, as Ovis 2 does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import relative_error

import dropflow
from dropflow.errors import UnsupportedCall
from dropflow.testing import tiny_models

POLICIES: dict[str, Any] = {
    "fastv": {"rank": {"use": "fastv/attention-rank", "at": 2, "keep": 5}},
    "late": {"late": {"use": "hidrop/late-injection", "at": 2}, "out": {"use": "vtw/withdrawal", "at": 4}},
    "encode": {"encode": {"use": "divprune/max-min", "keep": 0.4}},
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("parts", [(3, "I", 5), (2, "I", 4, "I", 3)])
@torch.no_grad()
def test_the_token_that_closes_an_image_is_as_if_asked_anew(parts: Any, name: str) -> None:
    _, tiny = tiny_models()["ovis2"]
    model, (inputs, _) = tiny.model(), tiny.prompt([parts])
    first, last = model.config.visual_indicator_token_ids[:2]
    assert {first, last} <= set(inputs["input_ids"][0].tolist()), "the prompt has tokens that enclose its image"
    with dropflow.attach(model, {"name": name, "stages": POLICIES[name]}) as flow:
        anew, live = model(**inputs).logits, flow.live()
        prefix = flow.prefix(**inputs)
        assert int(inputs["input_ids"][0, prefix.tokens - 1]) == last, "it belongs to the prefix"
        again = model(**prefix.inputs(**inputs)).logits
        assert torch.equal(flow.live(), live)
        assert relative_error(again[:, prefix.tokens :], anew[:, prefix.tokens :]) < 1e-5
        with pytest.raises(UnsupportedCall, match=f"expected a number of tokens from {prefix.tokens}, up to which"):
            flow.prefix(**inputs, tokens=prefix.tokens - 1)
        for indicator in model.config.visual_indicator_token_ids:  # those that the prefix does not have, too
            question = inputs["input_ids"].clone()
            question[0, -2] = indicator
            with pytest.raises(UnsupportedCall, match="or tokens that enclose them"):
                model(**prefix.inputs(**inputs | {"input_ids": question}))

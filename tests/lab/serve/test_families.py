"""Prompts of every family are joined as its processor would do it, or answered alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dropflow.testing
from dropflow_lab.serve.prompt import Prompt, joined

FAMILIES = sorted(dropflow.testing.tiny_models())
ALONE = {"molmo2", "minicpmv4_6"}
"""Families with inputs that point into the whole batch, or that are packed along another dimension."""


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_joined_prompts_give_the_logits_of_each_alone(family: str) -> None:
    tiny = dropflow.testing.tiny_models()[family][1]
    model = tiny.model()
    first, second = (dict(tiny.prompt([sample])[0]) for sample in ((3, "I", 5), (6, "I", 9)))
    second["pixel_values"] = second["pixel_values"].flip(-1) * 1.5
    one, two = Prompt(first, ""), Prompt(second, "")
    assert (one.shape == two.shape) is (family not in ALONE)
    assert one.shape == one.shape
    if family in ALONE:
        return

    def logits(inputs: dict[str, Any]) -> torch.Tensor:
        given = {name: value.clone() for name, value in inputs.items()}
        done = model.generate(
            **given, do_sample=False, max_new_tokens=3, min_new_tokens=3, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(done.logits, 1)

    alone = torch.cat([logits(first), logits(second)])
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    torch.testing.assert_close(logits(joined([one, two], 0)), alone, atol=1e-3, rtol=1e-3)

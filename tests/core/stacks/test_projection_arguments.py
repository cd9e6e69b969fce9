"""Projections that are given more than the hidden states, as PEFT's are, rank as they run."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from seven import SEVEN
from tiny import IMAGE, prompt, relative_error, tiny_llava
from torch import nn

import dropflow
from dropflow.backbone.wrapped import PEFT_CALLS_MODELS
from dropflow.engine.decoder.probe import _projecting, _SomeRows, _zeros_of
from dropflow.engine.model.shadowing import Shadows

SAMPLES = ((3, "I", 5), (1, "I", 9), ("I", 6))
ADAPTERS = ["one", "two", "__base__"]
"""Which adapter each sample of the batch runs with."""


@pytest.fixture(scope="module")
def adapted() -> Any:
    torch.manual_seed(3)
    projections = r".*language_model.*(q_proj|k_proj|v_proj)"
    config = peft.LoraConfig(r=4, target_modules=projections, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(tiny_llava(), config, adapter_name="one")
    model.add_adapter("two", config)
    return model.eval()


@pytest.mark.skipif(Version(peft.__version__) < PEFT_CALLS_MODELS, reason="this PEFT goes past the hooks of the model")
@pytest.mark.parametrize("which", ["hidrop", "mustdrop", "pyramiddrop", "fastv", "sparsevlm"])
@torch.no_grad()
def test_a_batch_of_mixed_adapters_keeps_what_each_adapter_keeps(adapted: Any, which: str) -> None:
    inputs, lives = prompt(SAMPLES), []
    with dropflow.attach(adapted, SEVEN[which]) as flow:
        mixed, kept = adapted(**inputs, adapter_names=ADAPTERS).logits, flow.live()
        for number, name in enumerate(ADAPTERS):
            if name == "__base__":
                with adapted.disable_adapter():
                    alone = adapted(**inputs).logits
            else:
                adapted.set_adapter(name)
                alone = adapted(**inputs).logits
            lives.append(flow.live())
            own = inputs["attention_mask"][number].bool()
            assert relative_error(mixed[number, own], alone[number, own]) < 1e-5
            assert torch.equal(kept[:, number], lives[number][:, number])
    visual = inputs["input_ids"] == IMAGE
    assert not torch.equal(lives[0][:, visual], lives[1][:, visual]), "the adapters agree on what stays"


def test_a_projection_that_nobody_reads_takes_any_arguments() -> None:
    projection, hidden = nn.Linear(4, 6), torch.randn(2, 3, 4)
    expected = projection(hidden)
    with _projecting(_zeros_of(projection), Shadows()):
        for args, kwargs in (((), {}), ((1.0, None), {}), ((), {"adapter_names": ["one"], "scale": 2.0})):
            found = projection(hidden, *args, **kwargs)
            assert found.shape == (2, 3, 6)
            assert not found.any()
    assert torch.equal(projection(hidden), expected)
    assert "forward" not in vars(projection)


def test_some_rows_are_projected_with_the_arguments_that_came_and_others_are_zero() -> None:
    projection, hidden = nn.Bilinear(4, 3, 6), torch.randn(2, 5, 4)
    beside, rows = torch.randn(2, 2, 3), torch.tensor([[4, 1], [2, 2]])
    some = _SomeRows(projection, rows, 5)
    with torch.no_grad(), _projecting({projection: some}, Shadows()):
        found = projection(hidden, beside)
    asked = hidden.gather(1, rows[:, :, None].expand(-1, -1, 4))
    assert some.projected
    assert torch.equal(found.gather(1, rows[:, :, None].expand(-1, -1, 6))[0], projection(asked, beside)[0])
    assert found[0, [0, 2, 3]].count_nonzero() == found[1, [0, 1, 3, 4]].count_nonzero() == 0


def test_rows_of_flattened_samples_are_not_projected() -> None:
    projection = nn.Linear(4, 6)
    some = _SomeRows(projection, torch.tensor([[1], [0]]), 5)
    assert not some(torch.randn(10, 4)).any()
    assert not some.projected

"""Chunked prefill of models whose core reads more fields of the vision side's output than `generate` hands on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import relative_error

import dropflow
from dropflow.testing import tiny_models

STAGES: dict[str, Any] = {
    "exit": {"out": {"use": "vtw/withdrawal", "at": 3}},
    "encode": {"encode": {"use": "divprune/max-min", "keep": 0.4}},
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_a_field_that_is_left_out_has_its_default(name: str, late: bool) -> None:
    families = tiny_models()
    if "granite_docling" not in families:
        pytest.skip("this version of transformers has no Granite Docling")
    _, tiny = families["granite_docling"]
    model, (inputs, _) = tiny.model(), tiny.prompt([(2, "I", 4, "I", 3)])
    budget: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    budget["return_dict_in_generate"] = True
    stages = STAGES[name] | ({"late": {"use": "hidrop/late-injection", "at": 1}} if late else {})
    with dropflow.attach(model, {"name": name, "stages": stages}) as flow:
        whole = torch.stack(model.generate(**inputs, **budget).logits)
        chunked = torch.stack(model.generate(**inputs, **budget, prefill_chunk_size=7).logits)
        assert relative_error(chunked, whole) < 1e-5
        assert flow.report().layers[-1].visual_tokens == (0 if name == "exit" else flow.report().entry_visual_tokens)

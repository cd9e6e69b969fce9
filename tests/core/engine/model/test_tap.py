"""Reading q and k leaves the table of attention functions unchanged, even if others have edited it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import HIDROP, prompt
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import dropflow
from dropflow.engine.model.tap import tapped

LOCAL: dict[str, Any] = vars(ALL_ATTENTION_FUNCTIONS)["_local_mapping"]


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Names of layers whose attention ran through this test's override."""
    seen: list[str] = []

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    before = dict(LOCAL)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = counted
    yield seen
    LOCAL.clear()
    LOCAL.update(before)


@torch.no_grad()
def test_an_override_of_somebody_else_runs_and_comes_back(llava: Any, calls: list[str]) -> None:
    standing = LOCAL["sdpa"]
    plain = llava(**prompt()).logits
    own = list(calls)
    calls.clear()
    with dropflow.attach(llava, HIDROP):
        llava(**prompt())
        assert LOCAL["sdpa"] is standing
        assert [name for name in own if "Llama" in name] == ["LlamaAttention"] * 6
        assert len(calls) >= len(own), "some layers did not go through the override"
    assert LOCAL["sdpa"] is standing
    assert torch.equal(llava(**prompt()).logits, plain)


def test_without_an_override_none_is_left() -> None:
    before = dict(LOCAL)
    shared = dict(AttentionInterface._global_mapping)

    def inside() -> None:
        assert LOCAL.keys() - before.keys() <= {"sdpa"}
        assert LOCAL["sdpa"] is not shared["sdpa"]

    tapped("sdpa", lambda _: None, inside)
    assert before == LOCAL
    assert shared == AttentionInterface._global_mapping


def test_taps_inside_each_other_and_errors_leave_nothing() -> None:
    before = dict(LOCAL)

    def fail() -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        tapped("sdpa", lambda _: None, lambda: tapped("eager", lambda _: None, fail))
    assert before == LOCAL

"""What a stage asks `attention_rows` for is checked before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import policy, prompt
from torch import Tensor

import dropflow
from dropflow import CacheCall, EncodeCall, PruneCall, Stage, hookimpl
from dropflow.errors import DecisionError

Ask = Callable[[Any, Any], Tensor]
INPUTS = prompt()
"""3 samples of 44 tokens with 3 images of 16 patches."""


class Asks(Stage[Any]):
    """Hands `attention_rows` of each hook to a test; the decoder's rows are read at a tapped layer and a boundary."""

    prune_at = (1,)
    taps = (0,)
    vision_taps = (1,)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.trial: Callable[[str, int, Ask], None] = lambda *_: None

    @hookimpl
    def encode(self, call: EncodeCall) -> None:
        self.trial("encode", 1, call.attention_rows)

    @hookimpl
    def prune(self, call: PruneCall) -> None:
        self.trial("tapped", 0, call.attention_rows)
        self.trial("boundary", 1, call.attention_rows)

    @hookimpl
    def decode_cache(self, call: CacheCall) -> None:
        self.trial("cache", 0, call.attention_rows)


def tried(model: Any, trial: Callable[[str, int, Ask], None]) -> None:
    """Call `trial` wherever a stage can ask for rows, in one forward."""
    with torch.no_grad(), dropflow.attach(model, policy(asks={"use": Asks})) as flow:
        ((_, stage),) = flow.plan.stages
        assert isinstance(stage, Asks)
        stage.trial = trial
        model(**INPUTS)


WRONG = {
    "negative": (torch.full((3, 2), -1), r"expected rows from 0 to (43|16), got -1"),
    "too high": (torch.tensor([[0, 44]] * 3), r"expected rows from 0 to (43|16), got 44"),
    "another type": ([[0]] * 3, "expected rows as an integer tensor .*, got list"),
    "no numbers": (torch.zeros(3, 1), "expected rows as an integer tensor .*, got torch.float32; `mask.nonzero"),
    "a mask": (torch.ones(3, 1, dtype=torch.bool), "expected rows as an integer tensor .*, got torch.bool"),
    "one sample": (torch.zeros(1, 1, dtype=torch.long), r"3 x one or more, got the shape \(1, 1\)"),
    "one axis": (torch.zeros(3, dtype=torch.long), r"3 x one or more, got the shape \(3,\)"),
    "no rows": (torch.zeros(3, 0, dtype=torch.long), r"3 x one or more, got the shape \(3, 0\)"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_rows_that_are_not_there_are_refused(llava: Any, fault: str) -> None:
    (rows, told), asked = WRONG[fault], []

    def trial(where: str, layer: int, ask: Ask) -> None:
        with pytest.raises(DecisionError, match=rf"attention_rows of layer {layer}: .*{told}") as raised:
            ask(layer, rows)
        assert "shape" not in told or f"({'images' if where == 'encode' else 'batch'}, rows)" in str(raised.value)
        asked.append(where)

    tried(llava, trial)
    assert asked == ["encode", "tapped", "boundary", "cache"]


def test_a_layer_is_a_number(llava: Any) -> None:
    def trial(_: str, __: int, ask: Ask) -> None:
        with pytest.raises(DecisionError, match=r"expected the number of a layer, got 'last'|layer last"):
            ask("last", torch.zeros(3, 1, dtype=torch.long))

    tried(llava, trial)


def test_rows_may_be_of_any_integer_type(llava: Any) -> None:
    def trial(_: str, layer: int, ask: Ask) -> None:
        rows = torch.tensor([[2, 0], [1, 1], [0, 2]])
        assert torch.equal(ask(layer, rows.int()), ask(layer, rows))

    tried(llava, trial)

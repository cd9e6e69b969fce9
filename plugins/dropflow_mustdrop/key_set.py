"""The key set: patches that the vision tower itself finds important and that no stage may drop (MustDrop, stage 1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from dropflow import Budget, Encode, EncodeCall, Forecast, Stage, StageOptions, hookimpl, operators

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class KeySetOptions(StageOptions):
    """Options of `mustdrop/key-set`."""

    share: float = Field(
        default=0.08, gt=0, le=1, description="share of the present rows of an image that is protected, rounded up"
    )
    layer: int = Field(
        default=-1,
        description="vision encoder layer whose attention ranks; negative ones count from its end. The published one "
        "(23 of 24) runs on exactly the features that the LLM gets. In a tower with windowed layers, name one without",
    )


class KeySet(Stage[KeySetOptions]):
    """The rows that the CLS token attends to most are protected: every later stage of any method keeps them.

    Score of a row: softmax attention from CLS in one encoder layer, averaged over heads; only that row of the map is
    computed. For towers without a CLS token (SigLIP, Qwen) it is the attention a row gets from all rows, on average,
    at the cost of one attention map. A row that is made of several patches has the mean of their scores. Ties go to the
    earlier row. Nothing is dropped here.
    """

    Options = KeySetOptions
    summary = "the patches that CLS attends to most are protected from every later stage"
    paper = "arXiv:2411.10803, vision encoding stage"
    needs = frozenset({"vision_attention"})

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """The ranking layer."""
        return (self.options.layer,)

    def forecast(self) -> Forecast:
        """No later stage leaves fewer."""
        return Forecast(protected=Budget(share=self.options.share, rounding="ceil"))

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Protect the best-ranked rows of each image."""
        import torch

        with torch.no_grad():
            layer = self.options.layer
            scores = call.cls_attention(layer) if call.has_cls else call.received_attention(layer)
            protect = [
                torch.zeros_like(own, dtype=torch.bool).index_fill(0, key_indices(own, self.options.share), True)
                for own in scores
            ]
        return Encode(protect=tuple(protect), scores=lambda: scores)


def key_indices(scores: Float[Tensor, "rows"], share: float) -> Int[Tensor, "keys"]:
    """The `ceil(share * rows)` best-scored rows in descending order, ties to the lowest index."""
    return operators.top(scores, math.ceil(share * len(scores)))

"""The key set: patches that the vision tower itself finds important and that no stage may drop (MustDrop, stage 1)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dropflow import Budget, Encode, EncodeCall, Forecast, Stage, StageOptions, hookimpl
from dropflow.operators import top


class KeySetOptions(StageOptions):
    """Options of `mustdrop/key-set`."""

    share: float = Field(
        default=0.08, gt=0, le=1, description="share of the present rows of an image that is protected, rounded up"
    )
    layer: int = Field(
        default=-1,
        description="vision encoder layer whose attention ranks; negative ones count from its end. The published one "
        "(23 of 24) runs on exactly the features that the LLM gets",
    )


class KeySet(Stage[KeySetOptions]):
    """The rows that the CLS token attends to most are protected: every later stage of any method keeps them.

    Score of a row: softmax attention from CLS in one encoder layer, averaged over heads; only that row of the map is
    computed. For towers without a CLS token (SigLIP, Qwen) it is the attention a row gets from all rows, on average,
    at the work of one map. Ties go to the earlier row. Nothing is dropped here.
    """

    Options = KeySetOptions
    summary = "the patches that CLS attends to most are protected from every later stage"
    paper = "arXiv:2411.10803, vision encoding stage"
    needs = frozenset({"vision_layers"})

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
        with torch.no_grad():
            layer = self.options.layer
            scores = call.cls_attention(layer) if call.has_cls else call.received_attention(layer)
        return Encode(protect=tuple(self._protected(own) for own in scores), scores=lambda: scores)

    def _protected(self, scores: Float[Tensor, "rows"]) -> Tensor:
        protected = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        protected[key_indices(scores, self.options.share)] = True
        return protected


def key_indices(scores: Float[Tensor, "rows"], share: float) -> Int[Tensor, "keys"]:
    """The `ceil(share * rows)` best-scored rows in descending order, ties to the lowest index."""
    return top(scores, math.ceil(share * len(scores)))

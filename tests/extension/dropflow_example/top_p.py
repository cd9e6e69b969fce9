"""Top-p pruning: as many visual tokens stay as hold a share of the instruction's attention to their image."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from dropflow import Depth, Forecast, Keep, PruneCall, Stage, StageOptions, hookimpl


class TopPOptions(StageOptions):
    """Options of `example/top-p`."""

    at: Depth = Field(description="boundary at which it prunes")
    mass: float = Field(gt=0, lt=1, description="share of the attention to an image that its kept tokens hold")


def top_p(scores: Float[Tensor, "rows tokens"], mass: float) -> Bool[Tensor, "rows tokens"]:
    """Keep, in every row, the fewest best tokens whose scores (>= 0) add up to `mass` times the row's sum."""
    ranked, order = torch.sort(scores, dim=1, descending=True, stable=True)
    total = ranked.cumsum(1)
    enough = total - ranked >= mass * total[:, -1:]  # the better tokens alone reach the mass
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, ~enough)


class TopP(Stage[TopPOptions]):
    """Of every image, the fewest tokens stay that hold `mass` of the attention the instruction pays to that image.

    The rule is that of nucleus sampling (arXiv:1904.09751, section 3.1): a picture with one clear spot keeps few
    tokens, a picture that is read all over keeps many.
    """

    Options = TopPOptions
    summary = "the fewest tokens that hold a share of the attention to their image"
    example: ClassVar = {"at": 0.5, "mass": 0.6}

    def forecast(self) -> Forecast:
        """How many tokens stay after the boundary `at` depends on the picture."""
        return Forecast(keeps={self.context.scale.boundary(self.options.at, self.context.path("at")): None})

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Rank by attention, and cut every image where the mass is reached."""
        rows = call.attention_rows(call.boundary, call.instruction_slots).mean(
            1
        )  # (batch, rows, keys), mean over heads
        scores = (rows * call.instruction_valid[:, :, None]).sum(1)[:, -call.index.shape[1] :]
        keep = ~call.instruction_valid.any(1, keepdim=True)  # nothing to rank by: everything stays
        for image in range(len(call.image_sizes)):
            keep = keep | top_p(scores * (call.image_id == image), self.options.mass)
        return Keep(keep, scores)

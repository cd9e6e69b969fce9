"""Max-min diversity: the tokens of each image that differ most from each other stay (DivPrune)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Encode, EncodeCall, Forecast, Stage, StageContext, StageOptions, Tokens, hookimpl


class MaxMinOptions(StageOptions):
    """Options of `divprune/max-min`."""

    keep: Tokens = Field(
        default=0.098,
        description="visual tokens of each image that reach the LLM, as a count or as a share of the image's tokens, "
        "rounded half to even as released; the published share is 0.098",
    )


class MaxMin(Stage[MaxMinOptions]):
    """Of the projected tokens of an image, a subset stays whose smallest cosine distance is as large as can be.

    The choice is greedy: first the token whose nearest neighbour is farthest, then again and again the token whose
    nearest chosen one is farthest. It reads neither attention nor the question, and changes no value; tokens stay in
    their order. A chosen token is never chosen again, which the released code does where an image has fewer distinct
    tokens than are asked for. Newline tokens of a tiled image are no candidates, and each image (tile, frame) has a
    choice of its own, where the released code looks at the first image of the first sample alone. Rows that an earlier
    stage protects stay on top of the number.
    """

    Options = MaxMinOptions
    summary = "the tokens of an image stay that are most unlike each other"
    paper = "arXiv:2503.02175, section 3.2"
    example: ClassVar[Mapping[str, Any]] = {"keep": 0.4}

    def __init__(self, options: MaxMinOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._budget = context.scale.tokens(options.keep, context.path("keep"), "half_even")

    def forecast(self) -> Forecast:
        """The budget."""
        return Forecast(encoded=self._budget)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Keep the most diverse rows of every image."""
        import torch

        from dropflow_divprune.diversity import max_min

        masks = []
        with torch.no_grad():
            for features in call.features:
                mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
                mask[max_min(features, self._budget.of(len(features)))] = True
                masks.append(mask)
        return Encode(keep=tuple(masks))

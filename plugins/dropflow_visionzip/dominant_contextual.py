"""Dominant and contextual tokens: patches that CLS attends to stay, the rest are merged (VisionZip)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from dropflow import (
    Budget,
    Encode,
    EncodeBoundary,
    EncodeCall,
    Forecast,
    Stage,
    StageContext,
    StageOptions,
    Tokens,
    hookimpl,
    operators,
)


class DominantContextualOptions(StageOptions):
    """Options of `visionzip/dominant-contextual`."""

    dominant: Tokens = Field(
        default=191,
        description="tokens of an image that stay as they are: those CLS attends to most, the CLS row itself included; "
        "0 keeps neither",
    )
    contextual: Tokens = Field(
        default=30, description="tokens that sum up the patches which are not dominant; 0 drops these"
    )
    layer: int = Field(
        default=-2,
        description="vision encoder layer whose attention and keys decide; negative ones count from its end. The "
        "published one (22 of 24) is the layer whose output the LLM gets. In a tower with windowed layers, name one "
        "without",
    )
    at: Literal["features", "output"] | None = Field(
        default=None,
        description="`features`: what the projector gets, as published; `output`: the projected features, for towers "
        "whose patches are pooled, shuffled or joined; left out, `features` where the backbone has that place",
    )


@dataclass(frozen=True)
class Reduced(Budget):
    """What is left of an image: dominant tokens, and as many contextual ones as the other patches allow."""

    dominant: Budget = field(default_factory=Budget)
    """Dominant tokens."""
    contextual: Budget = field(default_factory=Budget)
    """Contextual tokens, where the image has so many other patches."""

    def counts(self, patches: int) -> tuple[int, int]:
        """Dominant and contextual tokens of an image of so many patches."""
        dominant = self.dominant.of(patches)
        return dominant, min(self.contextual.of(patches), patches - dominant)

    def of(self, visual_tokens: int) -> int:
        """Dominant and contextual tokens together."""
        return sum(self.counts(visual_tokens))


class DominantContextual(Stage[DominantContextualOptions]):
    """The rows that CLS attends to most stay in raster order after the CLS row; the others are merged.

    Score of a patch: attention from CLS in one layer, summed over heads. Of the patches left over, evenly spaced ones
    are targets; every other one joins the target whose key (mean over heads) has the largest cosine with its own, and a
    contextual token is its target plus the mean of those that joined it. All of it happens on what the projector gets,
    so that the projector runs on fewer rows. For towers without a CLS token (SigLIP) the score is the attention a patch
    gets from all of them, and there is no CLS row to keep. Where more tokens are asked for than the image has patches,
    contextual ones are left out. Rows fill the image's first placeholders, in the published order.

    Other than published, on the projected features (`at: output`, and on its own where a backbone has no other place):
    a token's score and key are the means over the patches it is made of, no CLS row is kept, and of a picture in tiles
    the overview and the joined tiles are one image each.
    """

    Options = DominantContextualOptions
    summary = "the patches CLS attends to most stay, the others are merged into a few contextual tokens"
    paper = "arXiv:2412.04467, section 3"
    example: ClassVar[Mapping[str, Any]] = {"dominant": 0.3, "contextual": 0.2}
    needs = frozenset({"vision_attention"})

    def __init__(self, options: DominantContextualOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._reduced_to = Reduced(
            dominant=context.scale.tokens(options.dominant, context.path("dominant")),
            contextual=context.scale.tokens(options.contextual, context.path("contextual")),
        )

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """On what the projector gets, or on what it gives."""
        return (self.context.features_place(self.options.at),)

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """The deciding layer."""
        return (self.options.layer,)

    def forecast(self) -> Forecast:
        """Dominant and contextual tokens together."""
        return Forecast(encoded=self._reduced_to)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Reduce every image."""
        import torch

        from dropflow_visionzip.contextual import reduced, shares

        layer = self.options.layer
        with torch.no_grad():
            scores = call.cls_attention(layer) if call.has_cls else call.received_attention(layer)
            metric = call.unit_keys(layer)
        counts = [self._reduced_to.counts(len(features)) for features in call.features]
        rows = tuple(map(reduced, call.features, call.prefix_rows, scores, metric, counts))
        return Encode(
            rows=rows,
            places=operators.first_places(call.places, rows),
            shares=lambda: tuple(map(shares, call.features, call.prefix_rows, scores, metric, counts)),
            scores=lambda: tuple(scores),
        )

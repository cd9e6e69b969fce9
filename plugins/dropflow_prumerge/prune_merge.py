"""Adaptive pruning and merging by CLS attention before the projector (PruMerge and PruMerge+)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from dropflow import Encode, EncodeBoundary, EncodeCall, Forecast, Stage, StageOptions, hookimpl, operators

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class PruneMergeOptions(StageOptions):
    """Options of `prumerge/prune-merge`."""

    variant: Literal["prumerge", "plus"] = Field(
        default="plus",
        description="`prumerge`: the patches that stand out, alone; `plus`: evenly spaced patches beside them, as the "
        "released code runs",
    )
    ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the patches that stand out; left out, each image has as many as are outliers of its CLS "
        "attention",
    )
    outlier_factor: float = Field(
        default=1.5,
        ge=0,
        description="distance above the third quartile, in distances of the quartiles, from which a patch is an "
        "outlier; a larger one keeps fewer patches",
    )
    neighbours: PositiveInt = Field(default=32, description="patches that are merged into each one that stays")
    layer: int = Field(
        default=-1,
        description="vision encoder layer whose q and k rank; negative ones count from its end. The published one (23 "
        "of 24) runs on exactly the features that the LLM gets",
    )
    count: Literal["image", "reference"] = Field(
        default="image",
        description="`image`: every image counts its own outliers; `reference`: all images of a call share their mean "
        "number, as published, so that images change each other",
    )
    at: Literal["features", "output"] | None = Field(
        default=None,
        description="`features`: what the projector gets, as published; `output`: the projected features, for towers "
        "whose patches are pooled, shuffled or joined; left out, `features` where the backbone has that place",
    )


class PruneMerge(Stage[PruneMergeOptions]):
    """The patches whose attention from CLS is an outlier stay, each with its nearest patches merged into it.

    The attention is that of one head of the layer's whole width. A patch that stays becomes itself plus the sum of the
    32 patches with the most similar keys, weighted by their attention; one more token is the weighted sum of all that
    do not stay. `plus` adds every n-th patch in raster order, n being a third of the patches per outlier, so that the
    number of tokens falls in steps. Rows fill the image's first placeholders: outliers with the largest attention
    first, then evenly spaced patches, then the sum.

    Other than the released code: an image without any outlier keeps its best patch, `plus` works for any grid and for
    several images, never takes a patch twice, and the last token is left out where every patch stays. On the projected
    features (`at: output`, and on its own where a backbone has no other place) a token's score and keys are the means
    over the patches it is made of, and of a picture in tiles the overview and the joined tiles are one image each.
    """

    Options = PruneMergeOptions
    summary = "patches that stand out in CLS attention stay, with those alike to them merged in"
    paper = "arXiv:2403.15388, section 3"
    needs = frozenset({"cls", "vision_attention"})
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.25}

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """On what the projector gets, or on what it gives."""
        return (self.context.features_place(self.options.at),)

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """The ranking layer."""
        return (self.options.layer,)

    def forecast(self) -> Forecast:
        """The data decides."""
        return Forecast(encoded="data")

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Reduce every image."""
        import torch

        from dropflow_prumerge.outliers import reduced

        with torch.no_grad():
            scores = call.cls_attention(self.options.layer, joined=True)
            kept = [self._kept(s, count) for s, count in zip(scores, self._counts(scores), strict=True)]
            keys = call.unit_keys(self.options.layer, joined=True)
        neighbours = repeat(self.options.neighbours)
        rows = tuple(map(reduced, call.features, keys, scores, kept, neighbours))
        return Encode(
            rows=rows,
            places=operators.first_places(call.places, rows),
            shares=lambda: tuple(
                map(reduced, [torch.eye(len(own)).to(own) for own in call.features], keys, scores, kept, neighbours)
            ),
            scores=lambda: tuple(scores),
        )

    def _counts(self, scores: Sequence[Tensor]) -> list[int]:
        """Patches of each image that stand out, at least one."""
        import torch

        from dropflow_prumerge.outliers import outliers

        sizes, factor = [len(own) for own in scores], self.options.outlier_factor
        if self.options.ratio is not None:
            counts = [int(size * self.options.ratio) for size in sizes]
        elif self.options.count == "image":
            counts = torch.stack([outliers(own, factor) for own in scores]).tolist()
        else:
            share = int(outliers(torch.cat(list(scores)), factor)) / sum(sizes)
            counts = [int(size * share) for size in sizes]
        return [max(count, 1) for count in counts]

    def _kept(self, scores: Tensor, count: int) -> Int[Tensor, "kept"]:
        """The `count` patches that stand out, and with `plus` those sampled from the grid."""
        from dropflow_prumerge.outliers import grid_step, with_grid

        kept, patches = operators.top(scores, count), len(scores)
        if self.options.variant == "prumerge":
            return kept
        if self.options.ratio is None:
            return with_grid(kept, patches, first=0, step=grid_step(patches, count))
        step = min(max(int(1 / self.options.ratio), 1), 2 * patches)  # twice as many: no patch is on such a grid
        return with_grid(kept, patches, first=step // 2, step=step)

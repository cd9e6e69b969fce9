"""Local spatial merging: windows of similar patches become one token inside the vision tower (MustDrop, stage 1)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from dropflow import (
    Budget,
    Encode,
    EncodeCall,
    Forecast,
    Stage,
    StageContext,
    StageOptions,
    Tokens,
    hookimpl,
    operators,
)
from dropflow.errors import DecisionError, PolicyError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from dropflow import Backbone


class SpatialMergeOptions(StageOptions):
    """Options of `mustdrop/spatial-merge`."""

    at: int | Literal["output"] | None = Field(
        default=None,
        description="vision encoder boundary to merge at: `1` is after its layer 0, as published; `output` merges the "
        "projected features; left out, 1 where the encoder's layers can be reached and `output` elsewhere",
    )
    window: tuple[PositiveInt, PositiveInt] = Field(
        default=(3, 3), description="rows and columns of a window, in patches; the published one is 3 x 3"
    )
    threshold: float = Field(
        default=0.8, ge=-1, le=1, description="mean cosine similarity from which on a window is merged (inclusive)"
    )
    budget: Tokens | None = Field(
        default=None,
        description="instead of the threshold: merge as many of the most alike windows as leave at least this many "
        "tokens of an image",
    )
    order: Literal["reference", "raster"] = Field(
        default="reference",
        description="`reference`: merged tokens first, most alike first, as published; `raster`: each merged token "
        "stays at the last patch of its window",
    )
    count: Literal["image", "reference"] = Field(
        default="image",
        description="`image`: every image merges all windows that pass; `reference`: all images of a call merge as "
        "many as the one with the fewest, as published, so that images change each other",
    )


class SpatialMerge(Stage[SpatialMergeOptions]):
    """Windows of similar patches become one token each: the plain mean of their members.

    Position embeddings were added before; the encoder's later layers simply run on fewer tokens. Similarity of a
    window: mean cosine over pairs of its patches. Rows and columns after the last whole window stay as they are.
    Other than published, on the projected features (`at: output`, and on its own where a backbone's encoder cannot be
    reached) the encoder runs on all patches, windows count tokens of the LLM, and a smaller image stays whole.
    Raises `DecisionError` for an image without a patch grid, smaller than a window, or reduced by an earlier stage.
    """

    Options = SpatialMergeOptions
    summary = "windows of alike patches become one token inside the vision tower"
    paper = "arXiv:2411.10803, vision encoding stage"
    needs = frozenset({"grid"})

    def __init__(self, options: SpatialMergeOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._budget = None if options.budget is None else context.scale.tokens(options.budget, context.path("budget"))

    @property
    def encode_at(self) -> tuple[int | None, ...]:
        """The boundary `at`."""
        at = self.options.at
        if at is None:
            at = 1 if self.context.provides("vision_layers") else "output"
        return (None if at == "output" else at,)

    def prepare(self, backbone: Backbone) -> None:
        """Refuse to merge inside a packed tower, where rows are units whose positions follow their places."""
        tower = backbone.packed_tower
        if tower is not None and self.encode_at != (None,):
            raise PolicyError(
                f"{self.context.path('at')}: merges rows inside units of {tower.unit} that this model joins; merge "
                "whole units of the vision encoder's output, with `at: output`"
            )

    def forecast(self) -> Forecast:
        """What the budget leaves of an image; with a threshold the data decides."""
        tokens = self.context.scale.target.visual_tokens
        if self._budget is None or tokens is None:
            return Forecast(encoded="data")
        return Forecast(encoded=Budget(tokens=tokens - self._windows(tokens) * (self._members - 1)))

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode | None:
        """Merge windows of every image."""
        import torch

        from dropflow_mustdrop.merged_windows import merged_rows, window_scores

        members = [self._window_members(call, image) for image in range(len(call.features))]
        with torch.no_grad():
            similar = [operators.window_similarity(f, m) for f, m in zip(call.features, members, strict=True)]
            counts = self._counts(call, similar)
            # ties to the window that comes first
            taken = [
                torch.sort(s, descending=True, stable=True).indices[:r] for s, r in zip(similar, counts, strict=True)
            ]
        if not any(counts):
            return None
        merge = partial(merged_rows, raster=self.options.order == "raster")
        merged = [*map(merge, call.features, call.places, members, taken)]
        return Encode(
            rows=tuple(rows for rows, _ in merged),
            places=tuple(places for _, places in merged),
            shares=lambda: tuple(
                merge(torch.eye(len(own), device=own.device), *rest)[0]
                for own, *rest in zip(call.features, call.places, members, taken, strict=True)
            ),
            scores=lambda: tuple(map(window_scores, call.features, members, similar)),
        )

    @property
    def _members(self) -> int:
        return self.options.window[0] * self.options.window[1]

    def _windows(self, tokens: int) -> int:
        """Windows to merge so that an image of `tokens` tokens comes down to the budget, or just above it."""
        assert self._budget is not None
        return min((tokens - self._budget.of(tokens)) // max(self._members - 1, 1), tokens // self._members)

    def _window_members(self, call: EncodeCall, image: int) -> Int[Tensor, "windows members"]:
        grid, features = call.grids[image], call.features[image]
        where = f"stages.{self.context.name}: image {image}"
        if grid is None or len(features) != grid[0] * grid[1]:
            raise DecisionError(
                f"{where} has {len(features)} rows, expected those of its whole patch grid {grid}; merge before other "
                "stages drop patches"
            )
        members = operators.window_members(grid, self.options.window).to(features.device)
        if not len(members) and call.boundary is not None:
            raise DecisionError(f"{where} has a grid of {grid}, smaller than one window of {self.options.window}")
        return members

    def _counts(self, call: EncodeCall, similar: list[Float[Tensor, "windows"]]) -> list[int]:
        """Windows to merge in each image (one host synchronisation)."""
        import torch

        if self._budget is None:
            # the published comparison is in float32, whatever the features are
            threshold = torch.tensor(self.options.threshold, dtype=torch.float32, device=similar[0].device)
            counts: list[int] = torch.stack([(s >= threshold).sum() for s in similar]).tolist()
        else:
            sizes = zip(call.features, similar, strict=True)
            counts = [min(self._windows(len(features)), len(s)) for features, s in sizes]
        return [min(counts)] * len(counts) if self.options.count == "reference" else counts

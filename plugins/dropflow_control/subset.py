"""What controls that keep part of an image share: how many tokens stay, where, and how protected ones count."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Generic, Literal, Self, TypeVar

from pydantic import Field, model_validator

from dropflow import (
    Depth,
    Encode,
    EncodeBoundary,
    EncodeCall,
    Forecast,
    Keep,
    PruneCall,
    Stage,
    StageContext,
    StageOptions,
    Tokens,
    hookimpl,
    operators,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor


class SubsetOptions(StageOptions):
    """Options of controls that keep a number of tokens of every image."""

    keep: dict[Depth, Tokens] | None = Field(
        default=None,
        min_length=1,
        description="boundary -> visual tokens per image that stay after it, protected ones included",
    )
    encode: Tokens | None = Field(
        default=None, description="instead of `keep`: visual tokens of each image that reach the LLM"
    )

    per: Literal["image", "video"] = Field(
        default="image",
        description="what the number of `encode` counts for: every `image`, so that each frame of a video keeps as "
        "many; or every `video`, and pictures stay whole, as video methods leave them",
    )
    place: Literal["pixels", "output"] | Annotated[int, Field(ge=0)] = Field(
        default="output",
        description="where `encode` works: on the vision encoder's `output`; before its layer of that number, counted "
        "from 0; on `pixels`, before the tower runs, where a packed tower can leave units out",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.encode is None):
            raise ValueError("expected either `keep` (at boundaries of the LLM) or `encode` (before it)")
        if self.encode is None and self.place != "output":
            raise ValueError("`place` says where `encode` works, which is missing; give `encode` instead of `keep`")
        if self.encode is None and self.per != "image":
            raise ValueError("`per` says what `encode` counts for, which is missing; give `encode` instead of `keep`")
        return self


O_co = TypeVar("O_co", bound=SubsetOptions, covariant=True)


class Subset(Stage[O_co], Generic[O_co]):
    """Keeps as many tokens of every image as its options say; a subclass says which.

    Tokens that an earlier `encode` stage protects count against `keep`, and stay on top of the number in `encode`.
    """

    def __init__(self, options: O_co, context: StageContext) -> None:
        super().__init__(options, context)
        self._keeps = context.budgets("keep", options.keep or {})
        self._encoded = None if options.encode is None else context.scale.tokens(options.encode, context.path("encode"))

    @abstractmethod
    def rank(self, call: PruneCall, counts: list[int]) -> Float[Tensor, "batch slots"]:
        """Scores by which `counts` tokens of each image stay, protected ones in any case."""

    @abstractmethod
    def rows(
        self, features: Float[Tensor, "rows dim"], count: int, grid: tuple[int, int] | None
    ) -> Bool[Tensor, "rows"]:
        """Which `count` rows of one image stay; `grid` is that of the image, if all its patches are present."""

    @abstractmethod
    def video_rows(
        self, frames: Sequence[Float[Tensor, "rows dim"]], count: int, grids: Sequence[tuple[int, int] | None]
    ) -> Sequence[Bool[Tensor, "rows"]]:
        """Which `count` rows of all frames of a video stay, frame by frame; `grids` as in `rows`."""

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """The option `place`, with `encode`."""
        place = self.options.place
        return () if self._encoded is None else (None if place == "output" else place,)

    @property
    def ranks(self) -> bool:
        """False: it reads no attention."""
        return False

    @property
    def reads_videos(self) -> bool:
        """True where whole videos have a budget."""
        return self.options.per == "video"

    def forecast(self) -> Forecast:
        """The budgets; how much of each frame stays, the data decide."""
        return Forecast(encoded="data" if self.reads_videos else self._encoded, keeps=self._keeps)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode | None:
        """Keep rows of every image, or of every video."""
        budget = self._encoded
        if budget is None:
            return None
        whole = [
            grid if grid is not None and len(features) == grid[0] * grid[1] else None
            for features, grid in zip(call.features, call.grids, strict=True)
        ]
        if not self.reads_videos:
            masks = [
                self.rows(features, budget.of(len(features)), grid).to(features.device)
                for features, grid in zip(call.features, whole, strict=True)
            ]
            return Encode(keep=tuple(masks))
        keeps = []
        for video in call.videos or ():
            frames = [call.features[frame] for frame in video]
            own = self.video_rows(frames, budget.of(sum(map(len, frames))), [whole[frame] for frame in video])
            keeps.append([mask.to(call.places[0].device) for mask in own])
        return Encode(keep=operators.frame_keeps(call, keeps))

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep tokens of every image."""
        import torch

        budget = self._keeps[call.boundary]
        counts = [budget.of(size) for size in call.image_sizes]
        with torch.no_grad():
            scores = self.rank(call, counts)
        return Keep(operators.keep_top(scores.masked_fill(call.protected, torch.inf), call.image_id, counts), scores)

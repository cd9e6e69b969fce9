"""Random pruning: as many visual tokens as a method keeps, chosen without looking at what they show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from dropflow import PruneCall
from dropflow_control.subset import Subset, SubsetOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor


class RandomSubsetOptions(SubsetOptions):
    """Options of `control/random`."""

    seed: int = Field(default=0, ge=0, description="another seed keeps other tokens")


class RandomSubset(Subset[RandomSubsetOptions]):
    """A random subset of each image's tokens stays; every boundary draws anew among the tokens that are left.

    The same seed keeps the same tokens of an image, alone or in any batch; other images of the same size keep others.
    Per video, the tokens of all its frames are drawn together.
    Tokens that an earlier `encode` stage protects stay on top of the number that `encode` says.
    """

    Options = RandomSubsetOptions
    summary = "a control: a random subset of each image's tokens stays"
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.5, 0.7: 0.2}}

    def rank(self, call: PruneCall, counts: list[int]) -> Float[Tensor, "batch slots"]:
        """Random numbers, image by image."""
        import torch

        from dropflow_control.draw import draw

        scores = torch.zeros(call.image_id.shape, device=call.image_id.device)
        for image in range(len(counts)):
            own = call.image_id == image
            scores[own] = draw(self.options.seed, call.boundary, call.hidden[own]).to(scores)
        return scores

    def rows(
        self,
        features: Float[Tensor, "rows dim"],
        count: int,
        grid: tuple[int, int] | None,  # noqa: ARG002  # chance does not look where rows lie
    ) -> Bool[Tensor, "rows"]:
        """Random rows."""
        import torch

        from dropflow_control.draw import draw

        mask = torch.zeros(len(features), dtype=torch.bool)
        mask[draw(self.options.seed, self.encode_at[0], features).topk(count).indices] = True
        return mask

    def video_rows(
        self,
        frames: Sequence[Float[Tensor, "rows dim"]],
        count: int,
        grids: Sequence[tuple[int, int] | None],  # noqa: ARG002
    ) -> Sequence[Bool[Tensor, "rows"]]:
        """Random rows of the whole video."""
        import torch

        return torch.split(self.rows(torch.cat(list(frames)), count, None), [len(rows) for rows in frames])

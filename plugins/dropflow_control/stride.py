"""Uniform pruning: as many visual tokens as a method keeps, at even distances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dropflow import PruneCall
from dropflow_control.subset import Subset, SubsetOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor


class Stride(Subset[SubsetOptions]):
    """Tokens at even distances stay.

    With `encode` they are evenly spread over the rows and columns of the patch grid, where the image has all of it: a
    quarter of 24 x 24 patches is every second one of every second row. Per video, they are divided evenly among its
    frames, and spread in each. With `keep`, and for images without a grid, they
    are every n-th of the tokens that are left, in their order.
    """

    Options = SubsetOptions
    summary = "a control: tokens at even distances stay"
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.5, 0.7: 0.2}}

    def rank(self, call: PruneCall, counts: list[int]) -> Float[Tensor, "batch slots"]:
        """1 for the chosen tokens, 0 for all others."""
        import torch

        from dropflow_control.spacing import evenly

        chosen = torch.zeros_like(call.protected)
        for image, count in enumerate(counts):
            own = call.image_id == image
            free = own & ~call.protected
            size, held = free.sum(1, keepdim=True), (own & call.protected).sum(1, keepdim=True)
            chosen |= free & evenly(free.cumsum(1) - 1, (count - held).clamp(min=0), size)
        return chosen.float()

    def rows(
        self, features: Float[Tensor, "rows dim"], count: int, grid: tuple[int, int] | None
    ) -> Bool[Tensor, "rows"]:
        """Rows spread over the grid, or in their order."""
        from dropflow_control.spacing import spread

        return spread(count, grid or (1, len(features)))

    def video_rows(
        self, frames: Sequence[Float[Tensor, "rows dim"]], count: int, grids: Sequence[tuple[int, int] | None]
    ) -> Sequence[Bool[Tensor, "rows"]]:
        """As many rows of every frame, give or take one, spread over it."""
        from dropflow_control.spacing import divided

        return list(map(self.rows, frames, divided(count, [len(rows) for rows in frames]), grids))

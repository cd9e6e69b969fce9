"""Average pooling: the simplest way to merge, whatever the patches show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from dropflow import Encode, EncodeCall, Forecast, Stage, StageOptions, hookimpl
from dropflow.errors import DecisionError


class PoolOptions(StageOptions):
    """Options of `control/pool`."""

    window: tuple[PositiveInt, PositiveInt] = Field(
        default=(2, 2), description="rows and columns of patches that become one token; 2 x 2 leaves a quarter"
    )


class Pool(Stage[PoolOptions]):
    """Every window of the patch grid becomes one token, the mean of its rows in the vision encoder's output.

    Windows at the right and lower edge hold the patches that are left there. A token takes the place, and so the
    position, of the patch in the middle of its window. Protected patches are pooled like any other. Raises
    `DecisionError` for an image without a patch grid, or reduced by an earlier stage.
    """

    Options = PoolOptions
    summary = "a control: windows of patches are averaged"
    needs = frozenset({"grid"})
    example: ClassVar[Mapping[str, Any]] = {"window": (2, 2)}

    def forecast(self) -> Forecast:
        """How many windows an image has is up to its grid."""
        high, wide = self.options.window
        return Forecast(encoded="data", by_grid=lambda grid: -(-grid[0] // high) * -(-grid[1] // wide))

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Average the windows of every image."""
        import torch

        from dropflow_control.windows import pool

        pooled = []
        for image, (features, grid) in enumerate(zip(call.features, call.grids, strict=True)):
            if grid is None or len(features) != grid[0] * grid[1]:
                raise DecisionError(
                    f"stages.{self.context.name}: image {image} has {len(features)} rows, expected those of its whole "
                    f"patch grid {grid}; pool before other stages drop patches"
                )
            pooled.append(pool(features, grid, self.options.window))
        return Encode(
            rows=tuple(rows for rows, _ in pooled),
            places=tuple(places for _, places in pooled),
            shares=lambda: tuple(
                pool(torch.eye(len(features), device=features.device), grid, self.options.window)[0]
                for features, grid in zip(call.features, call.grids, strict=True)
                if grid is not None  # refused above
            ),
        )

"""What the stages of PixelPrune share: options that say which units are the same, and pixels in units of 0 to 1."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Generic, Literal, Self, TypeVar

from pydantic import Field, model_validator

from dropflow import Encode, EncodeBoundary, EncodeCall, Forecast, Stage, StageContext, StageOptions, hookimpl
from dropflow.errors import DecisionError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from dropflow import Backbone

Deviation = Annotated[float, Field(gt=0)]


class PixelOptions(StageOptions):
    """Options that say which units are the same."""

    metric: Literal["max", "mae", "rmse"] = Field(
        default="max",
        description="difference of two units: the largest of any number, the mean of all (`mae`), or the root of the "
        "mean square (`rmse`)",
    )
    threshold: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="largest difference of units that count as the same, for pixels from 0 to 1; 0 wants them equal. "
        "Resampled or JPEG pictures are seldom equal: 0.0157, a little above 4/255, is the next step",
    )
    std: Deviation | tuple[Deviation, Deviation, Deviation] | None = Field(
        default=None,
        description="what the processor divides pixels by (its `image_std`), one number or one for each channel, to "
        "undo it; needed with a threshold above 0",
    )

    @model_validator(mode="after")
    def _undoable(self) -> Self:
        if self.threshold > 0 and self.std is None:
            raise ValueError(
                "a `threshold` above 0 is in units of pixels from 0 to 1; state the `std` that the processor divides "
                "by, as in the `image_std` of preprocessor_config.json"
            )
        return self


O_co = TypeVar("O_co", bound=PixelOptions, covariant=True)


class PixelStage(Stage[O_co], Generic[O_co]):
    """Keeps some units of every picture by their pixels, before the vision tower runs."""

    needs = frozenset({"units", "grid"})

    def __init__(self, options: O_co, context: StageContext) -> None:
        super().__init__(options, context)
        self._patches = 1

    @abstractmethod
    def stays(self, units: Float[Tensor, "units width"], grid: tuple[int, int]) -> Bool[Tensor, "units"]:
        """Which units of a picture of `grid` (rows, columns) stay, by their pixels from 0 to 1, less a constant."""

    def prepare(self, backbone: Backbone) -> None:
        """Note how many patches a unit has."""
        tower = backbone.packed_tower
        self._patches = 1 if tower is None else tower.unit

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """Before the tower."""
        return ("pixels",)

    def forecast(self) -> Forecast:
        """The pixels decide."""
        return Forecast(encoded="data")

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Keep units of every picture, or of every time step of a video."""
        import torch

        masks = []
        with torch.no_grad():
            for units, grid in zip(call.features, call.grids, strict=True):
                if grid is None or grid[0] * grid[1] != len(units):
                    told = "an unknown grid" if grid is None else f"{grid[0]} x {grid[1]} units"
                    raise DecisionError(
                        f"works on whole pictures, got {len(units)} units of a picture of {told}; put it before other "
                        "stages on pixels"
                    )
                masks.append(self.stays(self._restored(units), grid).to(units.device))
        return Encode(keep=tuple(masks))

    def _restored(self, units: Float[Tensor, "units width"]) -> Float[Tensor, "units width"]:
        """Pixels as they were before the processor divided them; as they are where equality alone counts."""
        std = self.options.std
        if std is None or self.options.threshold == 0:
            return units
        scale = units.new_tensor(std).float().expand(3)[:, None]  # patch by patch, channel by channel
        return (units.float().view(len(units), self._patches, 3, -1) * scale).view(len(units), -1)

"""Withdrawal: every visual token leaves at one boundary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Depth, Forecast, Stage, StageOptions, WindowCall, hookimpl


class WithdrawalOptions(StageOptions):
    """Options of `vtw/withdrawal`."""

    at: Depth = Field(
        default=0.5,
        description="first boundary without vision, the published K; `dropflow_vtw.find_boundary` searches it",
    )


class Withdrawal(Stage[WithdrawalOptions]):
    """All visual tokens, however they rank, are gone from the boundary `at` on; text keeps its positions.

    Layers before the boundary are the dense model's, and so are their caches. `at` the model's depth changes
    nothing. Images are withdrawn wherever they stand in the prompt, and however many there are (the
    released code withdraws one block of a fixed length).
    """

    Options = WithdrawalOptions
    summary = "no visual tokens from a boundary on"
    paper = "arXiv:2405.05803, visual tokens withdrawal"
    example: ClassVar[Mapping[str, Any]] = {"at": 0.5}

    def forecast(self) -> Forecast:
        """Vision is gone from `at` on."""
        return Forecast(exit=self._boundary)

    @hookimpl
    def exit(self, call: WindowCall) -> int:  # noqa: ARG002  # the boundary is searched once, on other prompts
        """Boundary from which no vision is live."""
        return self._boundary

    @property
    def _boundary(self) -> int:
        return self.context.scale.boundary(self.options.at, self.context.path("at"))

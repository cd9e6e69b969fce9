"""Early exit: the last layers run on text only (HiDrop, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Forecast, Stage, StageContext, StageOptions, WindowCall, hookimpl
from dropflow.units import Depth


class EarlyExitOptions(StageOptions):
    """Options of `hidrop/early-exit`."""

    at: Depth = Field(description="first boundary without vision; the published `early_exit_layer` less one")


class EarlyExit(Stage[EarlyExitOptions]):
    """All remaining visual tokens are dropped at the boundary `at`; the caches of earlier layers keep theirs."""

    Options = EarlyExitOptions
    summary = "every visual token is gone from a boundary on"
    paper = "arXiv:2602.23699, section 3.3"
    training_free = False
    example: ClassVar[Mapping[str, Any]] = {"at": 0.8}

    def __init__(self, options: EarlyExitOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._at = context.scale.boundary(options.at, context.path("at"))

    def forecast(self) -> Forecast:
        """Vision is gone from `at` on."""
        return Forecast(exit=self._at)

    @hookimpl
    def exit(self, call: WindowCall) -> int:  # noqa: ARG002  # the published schedule is fixed
        """Boundary from which no vision is live."""
        return self._at

"""Late injection: the first layers run on text only, then raw visual embeddings join (HiDrop, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Depth, Forecast, Stage, StageContext, StageOptions, WindowCall, hookimpl


class LateInjectionOptions(StageOptions):
    """Options of `hidrop/late-injection`."""

    at: Depth = Field(description="boundary from which vision takes part; the published `late_entry_layer` less one")


class LateInjection(Stage[LateInjectionOptions]):
    """Visual tokens skip every layer before the boundary `at` and enter there as the projector made them.

    They keep their original position ids; text after the image runs its first layers without seeing it.
    """

    Options = LateInjectionOptions
    summary = "vision skips the first layers and enters untransformed at a boundary"
    paper = "arXiv:2602.23699, section 3.1"
    training_free = False
    example: ClassVar[Mapping[str, Any]] = {"at": 0.2}

    def __init__(self, options: LateInjectionOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._at = context.scale.boundary(options.at, context.path("at"))

    def forecast(self) -> Forecast:
        """Vision enters at `at`."""
        return Forecast(entry=self._at)

    @hookimpl
    def inject(self, call: WindowCall) -> int:  # noqa: ARG002  # the published schedule is fixed
        """Boundary from which vision is live."""
        return self._at

"""Early exit: the last layers run on text only (HiDrop, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Depth, Exit, Forecast, Stage, StageContext, StageOptions, WindowCall, hookimpl


class EarlyExitOptions(StageOptions):
    """Options of `hidrop/early-exit`."""

    at: Depth = Field(description="first boundary without vision; the published `early_exit_layer` less one")
    keep_last: bool = Field(
        default=False,
        description="let the last visual token live to the end where an answer follows the image at once, as captions "
        "do in pretraining, so that the first word is predicted from it; published: false, from the text before it",
    )


class EarlyExit(Stage[EarlyExitOptions]):
    """All remaining visual tokens are dropped at the boundary `at`; the caches of earlier layers keep theirs.

    Where an answer follows the image immediately (pretraining on BOS, image, caption), its first word is then predicted
    from the last text token before the image, which has not seen it. `keep_last` keeps the last visual token for
    it, through pruning and after the exit; prompts with text after the image are not touched.
    """

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
    def exit(self, call: WindowCall) -> Exit:  # noqa: ARG002  # the published schedule is fixed
        """Boundary from which no vision is live."""
        return Exit(self._at, self.options.keep_last)

"""A stage that is asked before every layer and drops nothing: what is left is the engine's own cost."""

from __future__ import annotations

from dropflow import Budget, Forecast, Keep, PruneCall, Stage, StageOptions, hookimpl


class KeepAll(Stage[StageOptions]):
    """Every visual token stays at every boundary."""

    summary = "asked before every layer, drops nothing"

    @property
    def prune_at(self) -> tuple[int, ...]:
        """Every boundary at which vision is live."""
        return tuple(range(self.context.window.entry, self.context.window.exit))

    @property
    def ranks(self) -> bool:
        """False: it reads no attention."""
        return False

    def forecast(self) -> Forecast:
        """All of an image's tokens, everywhere."""
        return Forecast(keeps=dict.fromkeys(self.prune_at, Budget(share=1.0)))

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep everything."""
        return Keep(call.valid.new_ones(call.valid.shape))

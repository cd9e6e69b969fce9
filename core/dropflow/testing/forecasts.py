"""Compares what a policy forecasts for every image with what a run did."""

from __future__ import annotations

from dropflow.engine.attach.flow import Flow
from dropflow.lifecycle.stage import Forecast, Stage
from dropflow.testing.case import REFUSAL, Case
from dropflow.testing.facts import truth


def check_forecast(case: Case, flow: Flow) -> None:
    """Check that the visual tokens per layer that `explain` prints match the flow's last run, unless left to the data.

    Nothing is checked if a stage that decides does not define `forecast`. Raises `BrokenGuarantee`, since rules that
    span stages rely on forecasts, and a wrong one lets through a policy that should be refused.
    """
    plan, live, owner = flow.plan, flow.live(), truth(case).owner
    deciding = {stage for hook in ("encode", "inject", "prune", "exit") for _, stage in plan.hooks.implementers(hook)}
    if any(type(stage).forecast is Stage.forecast for stage in deciding):
        return
    names = ", ".join(f"stages.{name}" for name, forecast in plan.forecasts.items() if forecast != Forecast())
    for image in range(int(owner.max()) + 1):
        own = owner == image
        size = int(own.sum())
        counts = (live & own).sum((1, 2)).tolist()
        for layer, (told, count) in enumerate(zip(plan.schedule(size).per_layer, counts, strict=True)):
            if told not in (None, count):
                sample = int(own.any(1).nonzero()[0])
                raise case.broken(
                    REFUSAL,
                    f"{told} visual tokens are forecast for image {image} (sample {sample}, {size} patches) in layer "
                    f"{layer}, but a run has {count}; check `forecast` of {names or 'the stages'}, and return `None` "
                    "or 'data' where the data decides",
                )

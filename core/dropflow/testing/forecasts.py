"""What a policy forecasts of every image, against what a run did with it."""

from __future__ import annotations

from dropflow.engine.attach.flow import Flow
from dropflow.lifecycle.stage import Forecast, Stage
from dropflow.testing.case import REFUSAL, Case
from dropflow.testing.facts import truth


def check_forecast(case: Case, flow: Flow) -> None:
    """The visual tokens per layer that `explain` prints are those of the flow's last run, or are left to the data.

    Nothing is checked where a stage that decides has no `forecast` of its own.
    Raises `BrokenGuarantee`: rules across stages are checked by forecasts, so that a wrong one lets through what is to
    be refused.
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
                    f"forecast are {told} visual tokens of image {image} (sample {sample}, {size} patches) in layer "
                    f"{layer}, a run has {count}; look at `forecast` of {names or 'the stages'}, and give `None` or "
                    "'data' where the data decides",
                )

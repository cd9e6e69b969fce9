"""Asks the stages at which boundaries visual tokens enter and exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dropflow.engine.tokens.prompt import Prompt
from dropflow.errors import DecisionError, quoted
from dropflow.lifecycle.payloads import Exit, WindowCall
from dropflow.lifecycle.stage import Window
from dropflow.policy.late_entry import late_entry

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.policy.plan import Plan


@dataclass(frozen=True)
class WindowDecision:
    """The boundaries where vision enters (deepest of the `inject` answers) and exits (shallowest of `exit`)."""

    window: Window
    keep_answer_sources: bool
    """Whether visual tokens from which an answer is predicted stay after the exit."""
    by: dict[int, tuple[str, ...]]
    """For each of the two boundaries, the stages that chose it."""


def decide_window(plan: Plan, backbone: Backbone, text: Tensor, prompt: Callable[[], Prompt]) -> WindowDecision:
    """Ask the `inject` and `exit` stages.

    `text` (batch, tokens) are the text tokens; `prompt()` may wait for the features, and is called if a stage asks how
    many visual tokens there are.
    """

    def visual_tokens() -> Tensor:
        whole = prompt()
        return (whole.present & whole.visual).sum(1)

    call = WindowCall(backbone, text.sum(1), visual_tokens)
    layers = plan.shape.layers
    entries = _boundaries(plan.hooks.inject(call), "inject", layers)
    answered = {name: one if isinstance(one, Exit) else Exit(one) for name, one in plan.hooks.exit(call)}
    exits = _boundaries(((name, one.boundary) for name, one in answered.items()), "exit", layers)
    window = Window(max(entries.values(), default=0), min(exits.values(), default=layers))
    late = late_entry(plan.shape, window)
    if late is not None:
        raise DecisionError("; ".join(f"stages.{name}: {late}" for name, one in entries.items() if one == window.entry))
    by = {
        boundary: tuple(name for name, answer in answers.items() if answer == boundary)
        for boundary, answers in ((window.entry, entries), (window.exit, exits))
    }
    spared = any(answered[name].keep_answer_sources for name in by[window.exit] if name in exits)
    return WindowDecision(window, spared, by)


def _boundaries(answers: Iterator[tuple[str, int]], hook: str, layers: int) -> dict[str, int]:
    found = dict(answers)
    for name, boundary in found.items():
        given: Any = boundary  # an `Exit` may hold anything
        if isinstance(given, bool) or not hasattr(given, "__index__") or not 0 <= given <= layers:
            raise DecisionError(
                f"stages.{name}: `{hook}` answered {quoted(boundary)}, expected a boundary from 0 to {layers}"
            )
    return found

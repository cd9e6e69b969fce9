"""Refuses calls in which dropping tokens would change the place by which a decoder layer scales its queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dropflow.errors import UnsupportedCall

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.engine.tokens.prompt import Prompt
    from dropflow.lifecycle.stage import Window
    from dropflow.policy.plan import Plan


def check_places(backbone: Backbone, first: int, length: int) -> None:
    """Raise `UnsupportedCall` if tokens may be missing before a layer that scales queries by their place in the call.

    They may from boundary `first` on. `length` counts the tokens of the call and of earlier ones. Nothing is refused
    below the number of tokens from which on the scale matters.
    """
    scale = backbone.place_scale
    if scale is None or length < scale.tokens:
        return
    layer = next((number for number in scale.layers if number >= first), None)
    if layer is not None:
        raise UnsupportedCall(
            f"layer {layer}: scales its queries by their place in the call, which pruning changes, from {scale.tokens} "
            f"tokens on, and there are {length}; shorten the prompt, or set `{scale.option}` to false when loading"
        )


def first_drop(plan: Plan, prompt: Prompt, window: Window) -> int:
    """The first boundary from which on tokens may be missing."""
    if window.entry or prompt.extents["present"] != prompt.extents["valid"]:
        return 0
    return window.exit if plan.uniform else min((*plan.prune_at, window.exit))

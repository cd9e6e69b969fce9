"""`dropflow check`: validate a policy file, and resolve it for a backbone shape where one is known."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dropflow_lab.console.commands.options import AsJson, Layers, Overrides, PolicyArgument, VisualTokens
from dropflow_lab.console.commands.output import chatter_to_stderr, emit

if TYPE_CHECKING:
    from dropflow import Policy
    from dropflow.units import BackboneShape


def check(
    policy: PolicyArgument,
    layers: Layers = None,
    visual_tokens: VisualTokens = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Validate a policy; all faults are reported at once, with exit code 2.

    The rules that span stages (inject before exit, keeps that never grow, ...) are checked for the given shape, or for
    the one the policy is tuned for.
    """
    from dropflow import load_policy
    from dropflow.backbone.flops import LLAVA_7B, vision_only
    from dropflow.policy.plan import resolve

    with chatter_to_stderr():
        loaded = load_policy(policy, overrides or ())
        shape = _shape(loaded, layers, visual_tokens)
        if shape is not None:
            resolve(loaded, shape, work=partial(vision_only, shape=LLAVA_7B))
    result = {
        "policy": loaded.name,
        "valid": True,
        "stages": {name: use.use for name, use in loaded.stages.items()},
        "resolved_for": shape and {"layers": shape.layers, "visual_tokens": shape.visual_tokens},
    }
    emit(result, as_json, f"{loaded.name}: valid, {_resolved(shape)}")


def _shape(policy: Policy, layers: int | None, visual_tokens: int | None) -> BackboneShape | None:
    from dropflow.units import BackboneShape
    from dropflow_lab.errors import InputError

    tuned = policy.tuned_for
    if layers is None and tuned is not None:
        layers = tuned.layers
    if visual_tokens is None and tuned is not None:
        visual_tokens = tuned.visual_tokens
    if layers is None and visual_tokens is not None:
        raise InputError("--visual-tokens: the depth is missing too; give --layers, or `tuned_for` in the policy")
    return None if layers is None else BackboneShape(layers, visual_tokens)


def _resolved(shape: BackboneShape | None) -> str:
    if shape is None:
        return "not resolved (give --layers and --visual-tokens to check the rules that span stages)"
    tokens = "any number of" if shape.visual_tokens is None else shape.visual_tokens
    return f"resolved for {shape.layers} layers and {tokens} visual tokens"

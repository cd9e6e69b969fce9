"""What cannot be served correctly is refused here, before anything runs, with what to do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.backbone.wrapped import check_compiled
from dropflow.engine.tokens.cache import check_cache
from dropflow.engine.vision.vision import FlowFeatures
from dropflow.errors import MissingImage, PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.lifecycle.questions import questions_of

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.lifecycle.stage import EncodeBoundary
    from dropflow.policy.plan import Plan


def check_model(backbone: Backbone, plan: Plan) -> None:
    """Refuse a policy whose stages need facts the backbone cannot give, or name layers it has not."""
    check_compiled({"core": backbone.core, "text decoder": backbone.text})
    facts = backbone.facts()
    faults = [
        f"stages.{name}: needs {', '.join(sorted(stage.needs - facts))}, which the adapter "
        f"{type(backbone).__name__} cannot give for this model; leave the stage out or extend the adapter"
        for name, stage in plan.stages
        if not stage.needs <= facts
    ]
    depth = plan.shape.layers
    for name, stage in plan.stages:
        wrong = [layer for layer in (*stage.prune_at, *stage.taps, *stage.decode_taps) if not 0 <= layer < depth]
        faults += [f"stages.{name}: names layer {layer}, but the model has layers 0 to {depth - 1}" for layer in wrong]
    faults += _vision_faults(backbone, plan)
    if plan.policy.positions == "compact" and not backbone.linear_positions:
        faults.append(
            "positions: `compact` renumbers one position per token, but this backbone's positions have several "
            "dimensions or differ by kind of layer; use `positions: persistent`"
        )
    if faults:
        raise PolicyError("\n".join(faults))


def _vision_faults(backbone: Backbone, plan: Plan) -> list[str]:
    """Stages that work where the vision encoder has no layer, or behind the layer whose output the LLM gets."""
    boundaries = [(name, b) for b, stages in plan.encode_at.items() if b is not None for name, _ in stages]
    taps = [(name, layer) for name, stage in plan.stages for layer in stage.vision_taps]
    vision = backbone.vision
    if vision is None:
        names = dict.fromkeys(name for name, _ in (*boundaries, *taps))
        return [f"stages.{name}: works inside the vision encoder, which this adapter cannot reach" for name in names]
    outside = [
        (name, b)
        for name, b in boundaries
        if not isinstance(b, str) and not (0 <= b < vision.feature_layer and b % 1 in (0, 0.5))
    ]
    faults = [
        f"stages.{name}: works at boundary {b} of the vision encoder{more}, expected 0 to {vision.feature_layer - 1}, "
        "in front of the layers that the features for the LLM pass through"
        for name, b, more in _first_of_each(outside)
    ]
    lacking = {
        name: what
        for name, b in boundaries
        for what, lacks in (
            ("on what the projector gets", b == "features" and vision.projector is None),
            ("between attention and feed-forward part of a layer", _inside_layer(b) and vision.sublayers is None),
        )
        if lacks
    }
    faults += [
        f"stages.{name}: works {what}, which this adapter does not name; see `VisionEncoder`"
        for name, what in lacking.items()
    ]
    beyond = [(name, layer) for name, layer in taps if not -vision.depth <= layer < vision.depth]
    return faults + [
        f"stages.{name}: reads vision layer {layer}{more}, but the encoder has layers 0 to {vision.depth - 1}"
        for name, layer, more in _first_of_each(beyond)
    ]


def _first_of_each(found: Sequence[tuple[str, Any]]) -> list[tuple[str, Any, str]]:
    """Of each stage the first place, and a word about how many there are more."""
    places: dict[str, list[Any]] = {}
    for name, place in found:
        places.setdefault(name, []).append(place)
    return [(name, own[0], f" and {len(own) - 1} more" if len(own) > 1 else "") for name, own in places.items()]


def _inside_layer(boundary: EncodeBoundary) -> bool:
    return isinstance(boundary, float) and boundary % 1 == 0.5


def check_call(backbone: Backbone, plan: Plan, arguments: dict[str, Any], brings_images: bool) -> None:
    """Refuse a call with images whose cache, attention or outputs cannot be right under a policy."""
    if not brings_images:
        return
    config: Any = backbone.text.config
    if config._attn_implementation == "flex_attention":
        raise UnsupportedModel(
            "attn_implementation: flex_attention masks cannot be gathered; load the model with 'sdpa', 'eager' or a "
            "flash_attention implementation"
        )
    _check_gradients(backbone, plan)
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModel(
            f"text decoder: {config.num_kv_shared_layers} layers share the keys of others, so that layers cannot hold "
            "different tokens; no policy can be attached to this model"
        )
    unknown = backbone.modalities_in(arguments) - backbone.visual_ids.keys()
    if unknown:
        raise UnsupportedModel(
            f"{', '.join(sorted(unknown))}: the adapter {type(backbone).__name__} knows no placeholder token for it; "
            "add it to the adapter's `modalities`, or leave that input out"
        )
    encoded = (arguments.get("mm_encoder_outputs") or {}).values()
    if plan.encode_at and any(value is not None and not isinstance(value, FlowFeatures) for value in encoded):
        raise UnsupportedCall(
            "mm_encoder_outputs: encoded without the policy, whose `encode` stages would be left out; pass the pixels, "
            "or encode them while the policy is attached"
        )
    if plan.reads_questions:
        ids = arguments.get("input_ids")
        questions_of(len(arguments["inputs_embeds"] if ids is None else ids))
    check_cache(arguments.get("past_key_values"), plan.shape.layers)
    check_positions(plan, arguments.get("position_ids"))
    for name, instead in (
        ("output_hidden_states", "layers hold different tokens; watch them with an `observe` stage"),
        ("output_attentions", "it needs eager attention and full maps; use `attention_rows` in a stage"),
        ("output_router_logits", "router logits of dropped tokens do not exist"),
    ):
        asked = arguments.get(name)
        if asked if asked is not None else getattr(config, name, False):
            raise UnsupportedCall(f"{name}: not available under a policy: {instead}, or detach the policy")


def _check_gradients(backbone: Backbone, plan: Plan) -> None:
    """Refuse to train a selection where the layers' attention cannot take soft weights."""
    implementation = backbone.text.config._attn_implementation
    names = [name for stages in plan.prune_at.values() for name, stage in stages if stage.differentiable]
    if names and torch.is_grad_enabled() and backbone.text.training and "flash" in implementation:
        raise UnsupportedCall(
            f"stages.{names[0]}: its selection trains through additive masks, which {implementation!r} does not take; "
            "load the model with 'sdpa' or 'eager', or set a hard selection in this stage"
        )


def check_positions(plan: Plan, position_ids: Tensor | None) -> None:
    """Refuse to renumber position ids that are not (batch, tokens)."""
    if plan.policy.positions == "compact" and position_ids is not None and position_ids.dim() != 2:
        raise UnsupportedCall(
            f"position_ids: of shape {tuple(position_ids.shape)}, but `positions: compact` renumbers (batch, tokens) "
            "only; use `positions: persistent`"
        )


def check_placeholders(backbone: Backbone, input_ids: Int[Tensor, "batch tokens"], cache: Any) -> None:
    """Refuse a new prompt that has image placeholders but brings no image."""
    if (
        input_ids.shape[1] > 1
        and (cache is None or not cache.get_seq_length())
        and bool(backbone.placeholders(input_ids).any())
    ):
        raise MissingImage(
            "pixel_values: missing, but the prompt has image placeholders; pass the processor's `pixel_values` along, "
            "or leave the placeholders out"
        )


def stated_tokens(
    visual: Bool[Tensor, "batch tokens"], shape: tuple[int, int], *, continues: bool
) -> Bool[Tensor, "batch tokens"] | None:
    """What a caller stated of a prompt, for a call of this (batch, tokens); `None` where it is a later step of it.

    `generate` repeats every sample for beams and returned sequences. Refuses what is stated for no part of the call.
    """
    batch, tokens = shape
    if visual.shape[1] == tokens and batch % visual.shape[0] == 0:
        return visual.repeat_interleave(batch // visual.shape[0], 0)
    if continues:
        return None
    raise UnsupportedCall(
        f"visual: stated for {tuple(visual.shape)} (batch, tokens), but this call has {shape}; state the tokens of the "
        "whole prompt, and keep `use_cache` on in `generate`"
    )


def check_encoded(plan: Plan, flags: Tensor | None) -> None:
    """Refuse image features that the policy's `encode` stages have not seen."""
    if flags is None and plan.encode_at:
        name = next(iter(plan.encode_at.values()))[0][0]
        raise UnsupportedCall(
            f"stages.{name}: encodes images, but the features of this call were made without it; pass `pixel_values`, "
            "or encode with the model's `get_image_features` while the policy is attached"
        )

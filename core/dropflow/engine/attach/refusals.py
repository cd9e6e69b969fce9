"""Refuses what cannot be served correctly, before anything runs, and says what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from dropflow.backbone.backbone import FACTS
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.backbone.vision_reader import listed_layers
from dropflow.engine.attach.mixer_refusals import check_mixers
from dropflow.engine.attach.recall_refusals import recall_faults
from dropflow.engine.attach.static_refusals import check_static
from dropflow.engine.attach.vision_refusals import vision_faults
from dropflow.engine.model.arguments import annotated_parameters, cache_in
from dropflow.engine.model.attention import HeadShards
from dropflow.engine.model.stand_in import StandIn
from dropflow.engine.tokens.ahead import ahead_in
from dropflow.engine.tokens.cache import check_cache, is_flow_cache
from dropflow.engine.tokens.restricting import CACHES, check_parameters
from dropflow.engine.tokens.row_flags import RowFlags
from dropflow.engine.vision.encoding import FlowFeatures
from dropflow.engine.vision.frames import check_videos
from dropflow.errors import MissingImage, PolicyError, UnsupportedCall, UnsupportedModel, nearest, quoted
from dropflow.lifecycle.questions import stated_questions_of

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.engine.decoder.site import Site
    from dropflow.policy.plan import Plan


TENSOR_STYLES = frozenset(
    {
        "colwise",
        "rowwise",
        "packed_colwise",
        "packed_rowwise",
        "rowwise_split_input",
        "rowwise_rep",
        "colwise_rep",
        "colwise_gather_output",
        "embedding_rowwise",
        "embedding_colwise",
        "replicated_with_grad_allreduce",
        "replicate",
        "all_reduce",
    }
)
"""Tensor-parallel plan styles under which every rank sees all tokens and some of the heads."""


def check_model(backbone: Backbone, plan: Plan, shards: HeadShards | None) -> None:
    """Refuse a policy whose stages need facts that the backbone cannot state, or name layers that it does not have."""
    check_mixers(backbone)  # before the arguments of its layers, because it has the better reason
    for layer in {type(layer): layer for layer in backbone.text._modules["layers"]}.values():
        found = annotated_parameters(layer)
        if found is not None:
            check_parameters(type(layer).__name__, found, backbone.token_arguments)
    facts = backbone.facts()
    faults = [
        f"stages.{name}: needs {quoted(fact)}, which is no fact (`dropflow.FACTS`); {nearest(fact, FACTS)}"
        for name, stage in plan.stages
        for fact in sorted(stage.needs - FACTS.keys())
    ]
    faults += [
        f"stages.{name}: needs {', '.join(sorted(stage.needs & FACTS.keys() - facts))}, which the adapter "
        f"{type(backbone).__name__} cannot give for this model; leave the stage out or extend the adapter"
        for name, stage in plan.stages
        if not stage.needs & FACTS.keys() <= facts
    ]
    depth = plan.shape.layers
    for name, stage in plan.stages:
        named = (*stage.prune_at, *stage.taps, *stage.decode_taps, *stage.decode_reads_at)
        wrong = [layer for layer in named if not 0 <= layer < depth]
        faults += [
            f"stages.{name}: names layer {layer}, expected 0 to {depth - 1}; name a layer that exists"
            for layer in wrong
        ]
    faults += vision_faults(backbone, plan)
    faults += [
        f"stages.{name}: trains its selection, for which gradients would have to cross the ranks of `tp_plan`; use "
        "FSDP2 or DistributedDataParallel, or set a hard selection in this stage"
        for name, stage in plan.stages
        if stage.differentiable and shards is not None
    ]
    if plan.policy.positions == "compact" and not backbone.linear_positions:
        faults.append(
            "positions: `compact` renumbers one position per token, but this backbone's positions have several "
            "dimensions or differ by kind of layer; use `positions: persistent`"
        )
    elif plan.policy.positions == "compact" and plan.shape.producers:
        layer, producer = plan.shape.producers[0]
        faults.append(
            f"positions: `compact` renumbers the tokens of every layer, but layer {layer} reads keys that layer "
            f"{producer} has rotated by its own numbers; use `positions: persistent`"
        )
    faults += recall_faults(backbone, plan) if plan.policy.recall else []
    if faults:
        raise PolicyError("\n".join(faults))


def head_shards(backbone: Backbone) -> HeadShards | None:
    """The ranks that share the heads of a tensor-parallel model; `None` for a model that is not sharded.

    Raises `UnsupportedModel` for a plan under which a rank does not see every token, or heads are not divided evenly.
    """
    model: Any = backbone.model
    size, mesh = getattr(model, "_tp_size", None) or 1, getattr(model, "_device_mesh", None)
    names = tuple(getattr(mesh, "mesh_dim_names", None) or ())
    if mesh is not None and "pp" in names and mesh["pp"].size() > 1:
        raise UnsupportedModel(
            "distributed_config: layers are spread over ranks (pp_size), which no policy can cross; use `tp_plan` or "
            "FSDP2"
        )
    if size <= 1 or mesh is None:
        return None
    unknown = sorted({style for style in (model.tp_plan or {}).values() if style not in TENSOR_STYLES})
    if unknown:
        raise UnsupportedModel(
            f"tp_plan: {', '.join(unknown)}: dropflow does not know what a rank sees under this style; known are "
            f"{', '.join(sorted(TENSOR_STYLES))}"
        )
    widths = backbone.decoder_widths
    if widths.heads % size or widths.kv_heads % size:
        raise UnsupportedModel(
            f"tp_plan: {widths.heads} heads and {widths.kv_heads} KV heads do not divide evenly among {size} ranks; "
            "use a number of ranks that divides both"
        )
    return HeadShards((mesh["tp"] if "tp" in names else mesh).get_group(), size)


def check_unshared(backbone: Backbone) -> None:
    """Refuse a model that shares layers with another model to which a policy is attached."""
    lists = [("text decoder", backbone.text._modules["layers"])]
    if backbone.vision is not None:
        lists.append(("vision encoder", listed_layers(backbone.vision.owner, "layers")))
    if backbone.packed_tower is not None:
        lists.append(("vision tower", listed_layers(backbone.packed_tower.owner, backbone.packed_tower.blocks)))
    for reader in filter(None, map(backbone.reader, backbone.modalities)):  # there may be one for each modality
        lists.append(("vision encoder", listed_layers(reader.owner, reader.layers)))
    for name, layers in lists:
        if isinstance(layers, StandIn):
            raise UnsupportedModel(
                f"{type(backbone.model).__name__}: shares its {name} with a model that has a policy attached, and each "
                "would take the other's calls for its own; detach that one, or give each model its own"
            )


def check_call(backbone: Backbone, plan: Plan, arguments: dict[str, Any], brings_images: bool) -> None:
    """Refuse a call with images whose cache, attention or outputs cannot be correct under a policy."""
    if not brings_images:
        return
    config: Any = backbone.text.config
    if config._attn_implementation == "flex_attention":
        raise UnsupportedModel(
            "attn_implementation: flex_attention masks cannot be gathered; load the model with 'sdpa', 'eager' or a "
            "flash_attention implementation"
        )
    _check_gradients(backbone, plan)
    unknown = backbone.modalities_in(arguments) - backbone.visual_ids.keys()
    if unknown:
        raise UnsupportedModel(
            f"{', '.join(sorted(unknown))}: the adapter {type(backbone).__name__} knows no placeholder token for it; "
            "add it to the adapter's `modalities`, or leave that input out"
        )
    for modality in backbone.modalities_in({**arguments, "mm_encoder_outputs": None}):  # others were checked before
        check_videos(backbone, plan, modality)
    encoded = (arguments.get("mm_encoder_outputs") or {}).values()
    if plan.encode_at and any(value is not None and not isinstance(value, FlowFeatures) for value in encoded):
        raise UnsupportedCall(
            "mm_encoder_outputs: encoded without the policy, so its `encode` stages would be skipped; pass the pixels, "
            "or encode them while the policy is attached"
        )
    if plan.reads_questions:
        ids = arguments.get("input_ids")
        stated_questions_of(len(arguments["inputs_embeds"] if ids is None else ids))
    _check_cache(backbone, plan, arguments)
    check_positions(plan, arguments.get("position_ids"))
    for name, instead in (
        ("output_hidden_states", "layers hold different tokens; use an `observe` stage"),
        ("output_attentions", "it needs eager attention and full maps; use `attention_rows` in a stage"),
        ("output_router_logits", "router logits of dropped tokens do not exist; leave it out"),
        ("return_shared_kv_states", "layers share keys of different tokens; leave it out"),
    ):
        asked = arguments.get(name)
        if asked if asked is not None else getattr(config, name, False):
            raise UnsupportedCall(f"{name}: not available under a policy: {instead}, or detach the policy")


def _check_cache(backbone: Backbone, plan: Plan, arguments: dict[str, Any]) -> None:
    """Refuse a cache that cannot hold the tokens the policy keeps; a policy that drops nothing accepts any cache."""
    name, cache = cache_in(arguments)
    others = [arguments[name] for name in CACHES if arguments.get(name) is not None]
    if name is None and others:
        cache = others[0]
    if not plan.uniform or plan.encode_at or ahead_in(cache) is not None:
        given: Any = (
            arguments.get("input_ids") if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
        )
        if given is not None:
            check_static(backbone, plan, cache, given.shape[1])
        check_cache(cache, plan.shape, uniform=plan.uniform)


def check_dense(arguments: dict[str, Any]) -> None:
    """Refuse caches and features made under a policy in a call that runs without one."""
    if is_flow_cache(cache_in(arguments)[1]):
        raise UnsupportedCall(
            f"{CACHE_ARGUMENT}: this cache was written under a policy, and this call runs without one; continue under "
            "the policy it was written with, or start with a fresh cache"
        )
    for modality, output in (arguments.get("mm_encoder_outputs") or {}).items():
        if isinstance(output, FlowFeatures):
            raise UnsupportedCall(
                f"mm_encoder_outputs: the {modality} features were encoded under a policy, and this call runs without "
                "one; pass the pixels"
            )


def check_packed(backbone: Backbone, implementation: str, starts: Tensor | None) -> None:
    """Refuse packed rows if a layer cannot tell documents apart once tokens are gone."""
    if starts is None:
        return
    if "flash" in implementation:
        raise UnsupportedCall(
            f"position_ids: restart within a row, and {implementation!r} finds document boundaries by the remaining "
            "positions, so documents would run together; load the model with 'sdpa' or 'eager', or pad the batch"
        )
    states = [number for number, mixer in enumerate(backbone.mixers) if mixer.kind == "recurrent"]
    if states:
        raise UnsupportedCall(
            f"position_ids: restart within a row, but layer {states[0]} ({backbone.mixers[states[0]].name}) has a "
            "state or a convolution that runs on from one document into the next; pad the batch"
        )


def refuse_direct_call(decoder: str) -> None:
    """Refuse a direct call of the decoder with embeddings if the caller does not state which are visual."""
    raise UnsupportedCall(
        f"{decoder}: called directly with `inputs_embeds`, in which no policy can identify visual tokens; state them "
        "by `with flow.visual(mask):` (all false for text), or call the whole model"
    )


def _check_gradients(backbone: Backbone, plan: Plan) -> None:
    """Refuse to train a selection where the layers' attention cannot take soft weights."""
    implementation = backbone.text.config._attn_implementation
    names = [name for stages in plan.prune_at.values() for name, stage in stages if stage.differentiable]
    if names and torch.is_grad_enabled() and backbone.text.training and "flash" in implementation:
        raise UnsupportedCall(
            f"stages.{names[0]}: its selection is trained through additive masks, which {implementation!r} does not "
            "accept; load the model with 'sdpa' or 'eager', or set a hard selection in this stage"
        )


def check_progress(site: Site) -> None:
    """Refuse to train a stage that follows the progress of training where nobody says how far it has come."""
    following = [name for name, stage in site.plan.stages if stage.follows_progress]
    if following and site.trained.progress is None:
        raise UnsupportedCall(
            f"stages.{following[0]}: changes in the course of training, but nothing says how far it has come; set "
            "`flow.progress` from 0 to 1 before every step, or add the callback `dropflow_lab.finetune.StageProgress`"
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
            "or leave the placeholders out. (In assisted generation the draft model gets no images from transformers, "
            "so no policy can be attached to it)"
        )


def check_encoded(plan: Plan, flags: Mapping[str, RowFlags] | None) -> None:
    """Refuse image features that did not pass through the policy's `encode` stages."""
    if flags is None and plan.encode_at:
        name = next(iter(plan.encode_at.values()))[0][0]
        raise UnsupportedCall(
            f"stages.{name}: encodes images, but the features of this call were made without it; pass `pixel_values`, "
            "or encode with the model's `get_image_features` while the policy is attached"
        )

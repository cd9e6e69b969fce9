"""Compares what an adapter states about a prompt with how the prompt was built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from dropflow.backbone.backbone import Backbone
from dropflow.errors import DecisionError, PolicyError, UnsupportedModel
from dropflow.testing.case import BrokenGuarantee, Case, relative_error
from dropflow.testing.families.tiny import IMAGE, VIDEO
from dropflow.testing.probes import INSIDE, Ranks, Witness, policy, use

TOKENS, OWNER, GRID, VIDEOS = "token ids", "image owner", "grid", "videos"
SIZE, LAYERS, PROJECTIONS = "tokens of one image", "layers of the vision tower", "projections"
VISION_LAYERS = "vision_layers"


@dataclass(frozen=True)
class Truth:
    """How a prompt was built."""

    owner: Tensor
    """Number (batch, tokens) of the image of which a token is a patch; -1 for all other tokens."""
    grids: Sequence[tuple[int, int] | None]
    """Grid of every image, those of still images before those of videos, in the order of encoding."""
    videos: Sequence[tuple[int, ...]]
    """The images that are the frames of every video."""


def truth(case: Case) -> Truth:
    """Number the patches of the case's pictures."""
    ids, shown = case.inputs["input_ids"], case.drawn[1]
    owner, grids, videos, first = torch.full_like(ids, -1), [], [], 0
    for token in (IMAGE, VIDEO):
        for sample, pictures in enumerate(shown):
            places = iter((ids[sample] == token).nonzero()[:, 0].tolist())
            for picture in (picture for picture in pictures if token in picture.ids):
                if "pixel_values_videos" in picture.arguments:
                    videos.append(tuple(range(first, first + len(picture.layouts))))
                for layout in picture.layouts:
                    own = [next(places) for _ in range(layout.tokens)]
                    owner[sample, torch.tensor(own)[~layout.extra(ids.device)]] = first
                    grids.append(layout.grid)
                    first += 1
    return Truth(owner, grids, videos)


@torch.no_grad()
def check_facts(case: Case) -> None:
    """Check that the adapter states the visual tokens, their images and the grids as the prompt was built.

    Raises `BrokenGuarantee`, naming the fact and the part of the adapter that states it.
    """
    _check_parts(case)
    expected, witness = truth(case), None
    try:
        with case.attach(policy(look=use(Witness))) as flow:
            witness = cast(Witness, flow.plan.stages[0][1])
            case.model(**case.inputs)
    except UnsupportedModel as refusal:
        raise _wrong(case, TOKENS, str(refusal), "`modalities`, `visual_ids` or `layouts`") from refusal
    got = torch.full_like(expected.owner, -1) if witness.images is None else witness.images
    _check_tokens(case, got, expected.owner)
    _check_owner(case, got, expected.owner)
    _check_size(case)
    for image, (said, true) in enumerate(zip(witness.grids, expected.grids, strict=True)):
        if said != true:
            raise _wrong(
                case, GRID, f"image {image} has the grid {true}, the adapter says {said}", "`grid` or `layouts`"
            )
    if not case.adapter.unstated_videos and witness.videos != list(expected.videos):
        what = f"the videos have the frames {expected.videos}, the adapter says {witness.videos}"
        raise _wrong(case, VIDEOS, what, "`video_lengths` or `unstated_videos`")


@torch.no_grad()
def check_vision(case: Case) -> None:
    """Check that the rows of the encoder that the adapter states reach the LLM, so that stages can drop rows inside.

    Raises `BrokenGuarantee`, naming the part of the adapter that states it; nothing is checked if it states none.
    """
    vision, widths = case.adapter(case.model).vision, []
    if vision is None:
        return
    layer, projector = vision.owner._modules["layers"][vision.feature_layer - 1], vision.projector
    handles = [layer.register_forward_hook(lambda _, __, output: widths.append(_rows(output).shape[-1]))]
    if projector is not None:
        handles.append(projector.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1])))
    try:
        case.model(**case.inputs)
        if len(set(widths)) > 1:
            what = (
                f"layer {vision.feature_layer - 1} of the encoder returns rows of {widths[0]} numbers, but the "
                f"projector receives rows of {widths[-1]}, for example of several layers joined"
            )
            raise _wrong(case, VISION_LAYERS, what, "`vision`, which must then be None,")
        with case.attach(INSIDE):
            case.model(**case.inputs)
    except (PolicyError, DecisionError, RuntimeError) as error:
        what = f"rows cannot be dropped inside the encoder: {error}"
        raise _wrong(case, VISION_LAYERS, what, "`vision`, which must then be None,") from error
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_projections(case: Case) -> None:
    """Check that ranking through the stated projections gives what it gives where none are stated.

    Raises `BrokenGuarantee`, naming the layer and the part of the adapter; nothing is checked if it states none.
    """
    states = case.adapter.projections
    unstated = type(case.adapter.__name__, (case.adapter,), {"projections": lambda self, layer: None})  # noqa: ARG005
    if states is Backbone.projections:
        return
    seen = []
    for adapter in (unstated, case.adapter):
        try:
            with replace(case, adapter=adapter).attach(policy(ranks=use(Ranks))) as flow:
                case.model(**case.inputs)
                seen.append(cast(Ranks, flow.plan.stages[0][1]).rows)
        except (AttributeError, TypeError, IndexError, RuntimeError) as error:
            if adapter is unstated:
                raise
            raise _wrong(case, PROJECTIONS, f"ranking through them fails: {error}", "`projections`") from error
    for layer, expected in seen[0].items():
        if relative_error(seen[1][layer], expected) > case.tiny.tolerance:
            what = f"the attention rows of layer {layer} differ from those of the layer's own q and k"
            raise _wrong(case, PROJECTIONS, what, "`projections`")


def _rows(output: Any) -> Tensor:
    rows: Tensor = output if isinstance(output, Tensor) else output[0]
    return rows


def _check_parts(case: Case) -> None:
    """What an adapter names as a tower must hold layers, and layers with attention must hold what it names in them."""
    backbone = case.adapter(case.model)
    towers = {"vision": backbone.vision, "packed_tower": backbone.packed_tower}
    for where, tower in (*towers.items(), *(("reader", backbone.reader(kind)) for kind in backbone.modalities)):
        try:
            if tower is not None and tower.depth < 1:
                raise _wrong(case, LAYERS, "the tower has no layers", f"`{where}`")
        except UnsupportedModel as refusal:
            raise _wrong(case, LAYERS, str(refusal), f"`{where}`") from refusal
    layers = list(backbone.text._modules["layers"])
    for number in backbone.shape.with_attention:
        try:
            backbone.projections(layers[number])
        except AttributeError as error:
            raise _wrong(case, PROJECTIONS, f"of layer {number}: {error}", "`projections`") from error


def _check_tokens(case: Case, got: Tensor, expected: Tensor) -> None:
    wrong = (got >= 0) != (expected >= 0)
    if bool(wrong.any()):
        sample, token = wrong.nonzero()[0].tolist()
        number = int(case.inputs["input_ids"][sample, token])
        said, true = ("no patch", "a patch") if expected[sample, token] >= 0 else ("a patch", "no patch")
        what = f"token {token} of sample {sample} (id {number}) is {true} of an image, the adapter says it is {said}"
        raise _wrong(case, TOKENS, what, "`modalities`, `visual_ids`, or the extra rows in `layouts`")


def _check_owner(case: Case, got: Tensor, expected: Tensor) -> None:
    names: dict[int, int] = {}
    for sample, token in (expected >= 0).nonzero().tolist():
        own, true = int(got[sample, token]), int(expected[sample, token])
        if names.setdefault(true, own) != own or list(names.values()).count(own) > 1:
            what = (
                f"token {token} of sample {sample} is a patch of image {true}, but the adapter gives it to an image "
                f"with other patches; it states {len(set(got[got >= 0].tolist()))} images, the prompt has "
                f"{len(set(expected[expected >= 0].tolist()))}"
            )
            raise _wrong(case, OWNER, what, "`layouts` or `tokens_per_image`")


def _check_size(case: Case) -> None:
    stated = case.adapter(case.model).tokens_per_image
    sizes = [layout.tokens for shown in case.drawn[1] for picture in shown for layout in picture.layouts]
    if stated is not None and any(size != stated for size in sizes):
        what = f"an image has {next(size for size in sizes if size != stated)} tokens, the adapter says {stated}"
        raise _wrong(case, SIZE, what, "`tokens_per_image`")


def _wrong(case: Case, fact: str, what: str, where: str) -> BrokenGuarantee:
    return BrokenGuarantee(f"{case.name}: the fact '{fact}' is wrong: {what}; see {where} of {case.adapter.__name__}")

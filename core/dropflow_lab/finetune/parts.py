"""Which parameters of a model are its vision encoder, its projector and its language model, and which are trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import dropflow
from dropflow_lab.errors import InputError
from dropflow_lab.finetune.recipe import PARTS

PartName = Literal["vision", "projector", "language", "stages"]
_IN_TOWER = ("merger", "deepstack_merger_list", "connector")
"""Projectors that transformers puts into the vision tower, as children of it."""


def parts_of(model: Any) -> dict[str, PartName]:
    """Return the part of every parameter by name.

    `language` is the text decoder with embeddings and LM head, `vision` every tower without its merger, `stages` the
    modules of the attached policy's stages, `projector` what remains.
    """
    tower = model.get_encoder(modality="image")
    own = {id(weight) for weight in dropflow.backbone_for(model).text.parameters()}
    head = model.get_output_embeddings()
    own |= {id(weight) for weight in head.parameters()} if head is not None else set()
    inside: dict[int, PartName] = {}
    if tower is not model:  # a model without a tower returns itself
        for name, weight in tower.named_parameters():
            inside[id(weight)] = "projector" if name.split(".")[0] in _IN_TOWER else "vision"
    found: dict[str, PartName] = {}
    for name, weight in model.named_parameters():
        if id(weight) in own:
            found[name] = "language"
        elif name.startswith("dropflow_stages."):
            found[name] = "stages"
        else:
            other_tower = any(part.endswith("_tower") for part in name.split("."))
            found[name] = inside.get(id(weight), "vision" if other_tower else "projector")
    return found


def train_parts(model: Any, train: Sequence[str], where: str) -> list[str]:
    """Let exactly the parameters that `train` selects require gradients; return their names.

    Raises `InputError`, which begins with `where`, for a part or a pattern that selects none; for `stages` only once a
    policy is attached.
    """
    parts, flow = parts_of(model), dropflow.flow_of(model)
    chosen: set[str] = set()
    for name in train:
        found = {own for own, part in parts.items() if (part == name if name in PARTS else fnmatchcase(own, name))}
        if not found and name == "stages":
            if flow is None:
                continue
            raise InputError(
                f"{where}: no stage of the policy has anything to learn, as `hidrop/concave-pyramid` has with `learn: "
                "true`; leave `stages` out"
            )
        if not found:
            raise InputError(f"{where}: {name!r} selects no parameter of this model, such as {next(iter(parts))}")
        chosen |= found
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in chosen)
    return sorted(chosen)

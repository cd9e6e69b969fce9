"""The space that CLIP shares between pictures and text, for patches of a vision tower that was taken from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dropflow.errors import PolicyError, escaped, quoted

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone


class JointSpace:
    """CLIP's text tower and both of its projections, in float32; its vision tower is not kept."""

    def __init__(self, source: str, backbone: Backbone, path: str) -> None:
        """Load CLIP from a folder or a hub name, given as the option at `path`.

        Raises `PolicyError` where there is no CLIP, or where its width is not that of the backbone's vision tower;
        that is seen before any weights are loaded.
        """
        from transformers import AutoConfig

        with _told_of(source, path):
            self._config: Any = AutoConfig.from_pretrained(source, local_files_only=os.path.isdir(source))
            if self._config.model_type != "clip":
                raise ValueError(f"it is a model of type {self._config.model_type!r}")
        _check_tower(self._config.vision_config.hidden_size, source, backbone, path)
        with _told_of(source, path):
            self._tokenizer, self._model = _load(source, backbone.model.device)
        self._device = backbone.model.device

    @property
    def width(self) -> int:
        """Numbers per vector."""
        return int(self._config.projection_dim)

    @property
    def tower_width(self) -> int:
        """Numbers per patch of the vision tower."""
        return int(self._config.vision_config.hidden_size)

    @torch.no_grad()
    def patches(self, features: Float[Tensor, "rows tower"]) -> Float[Tensor, "rows width"]:
        """Patches of the tower as the projector gets them, after CLIP's last norm and visual projection."""
        normed = self._model.vision_model.post_layernorm(features.to(self._device, torch.float32))
        projected: Tensor = self._model.visual_projection(normed)
        return projected

    @torch.no_grad()
    def text(self, question: str, *, reference: bool = False) -> Float[Tensor, "segments width"]:
        """A question, cut into segments where it is longer than CLIP's text tower reads.

        Every segment has its own start and end token; with `reference` the whole question has one of each and is cut
        as it is, so that the tower reads a segment without an end token at another place.
        """
        longest = self._config.text_config.max_position_embeddings
        ids = self._tokenizer(question)["input_ids"]
        if len(ids) <= longest or reference:
            segments = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        else:
            inner, step = ids[1:-1], longest - 2
            parts = [inner[start : start + step] for start in range(0, len(inner), step)]
            segments = [[ids[0], *part, ids[-1]] for part in parts]
        size = max(len(segment) for segment in segments)
        table = torch.tensor([segment + [0] * (size - len(segment)) for segment in segments], device=self._device)
        mask = torch.tensor([[1] * len(s) + [0] * (size - len(s)) for s in segments], device=self._device)
        pooled = self._model.text_model(input_ids=table, attention_mask=mask).pooler_output
        projected: Tensor = self._model.text_projection(pooled)
        return projected


@lru_cache(maxsize=1)
def _load(source: str, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and model; the last one is kept, since policies are attached again and again to compare them."""
    from transformers import AutoModel, AutoTokenizer

    local = {"local_files_only": os.path.isdir(source)}  # a folder must not lead to a hub, whatever it names
    tokenizer = AutoTokenizer.from_pretrained(source, **local)
    model = AutoModel.from_pretrained(source, dtype=torch.float32, **local)
    model.vision_model.encoder = model.vision_model.embeddings = None  # neither runs
    return tokenizer, model.to(device).eval().requires_grad_(requires_grad=False)


@contextmanager
def _told_of(source: str, path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = escaped(str(error).strip().split("\n")[0].rstrip("."))
        raise PolicyError(
            f"{path}: expected a folder or hub name of a CLIP model with its tokenizer, got {quoted(source)}: {reason}"
            "; name one, or leave the option out"
        ) from None


def _check_tower(width: int, source: str, backbone: Backbone, path: str) -> None:
    tower = backbone.vision
    own = None if tower is None else tower.owner.config
    if own is None or own.model_type != "clip_vision_model" or own.hidden_size != width:
        found = "none that can be reached" if own is None else f"{own.model_type!r} of width {own.hidden_size}"
        raise PolicyError(
            f"{path}: {escaped(source)} has a CLIP vision tower of width {width}, but that of the model is {found}"
            "; name the CLIP model that the tower was taken from, or leave the option out"
        )

"""The vision side of a call: `encode` stages inside the encoder and on its output, and how their answers travel.

What an `encode` stage drops stays in the features as a row that is not live, so that placeholders, position ids,
deepstack features and multimodal RoPE stay aligned. The flags of every row (see `image_layout.py`) say so, and which
image it belongs to. `generate` encodes images before the forward and may expand or slice the features in between; the
flags ride along as one more entry of `deepstack_features`, which transformers expands and slices with the features, and
are taken off before the model sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dropflow.backbone.image_layout import ImageLayout, flags
from dropflow.engine.model.stand_in import StandIn
from dropflow.engine.vision.encode import EncodeRun
from dropflow.errors import UnsupportedModel
from dropflow.lifecycle.events import EncodeEvent, EncodeStep
from dropflow.policy.plan import Plan

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone


@dataclass
class FlowFeatures(BaseModelOutputWithPooling):  # type: ignore[misc]  # transformers ships no types
    """Encoded images with the flags of their rows as the last entry of `deepstack_features`."""

    deepstack_features: Any = None


class Vision:
    """Encodes the images of one attached model, and says which row is whose."""

    def __init__(self, plan: Plan, backbone: Backbone) -> None:
        self._plan, self._backbone = plan, backbone
        encoder = backbone.vision
        inside = any(b is not None for b in plan.encode_at) or any(s.vision_taps for _, s in plan.stages)
        self._stand_in = StandIn(encoder.owner) if encoder is not None and inside else None

    def encode(
        self, modality: str, features: Callable[[], Any], arguments: Mapping[str, Any]
    ) -> tuple[Any, list[Float[Tensor, "rows flags"]]]:
        """Run `features()` with the encode stages; returns its output, one row per placeholder again, and the flags.

        `arguments` are those of the model's own method; flags come one table per entry of the features.
        """
        if not self._plan.encode_at:
            output = features()
            if self._plan.hooks.watched("observe_encode"):
                self._tell(modality, _layouts_of(self._backbone, modality, output, arguments), ())
            return output, plain_flags(self._backbone, modality, output, arguments)
        run = EncodeRun(self._plan, self._backbone)
        if self._stand_in is None:
            output = features()
        else:
            with self._inside(run):
                output = features()
        name, pooled = _features(output)
        found = _entries(pooled)
        layouts: list[list[ImageLayout]] = []

        def layouts_of(sizes: Sequence[int]) -> list[list[ImageLayout]]:
            layouts[:] = _layouts(self._backbone, modality, sizes, arguments, isinstance(pooled, Tensor))
            return layouts

        full, tables = run.finish(found, layouts_of)
        if run.steps is not None:
            self._tell(modality, layouts, run.steps)
        if isinstance(pooled, Tensor):
            output[name] = full[0] if pooled.dim() == 2 else torch.stack(full)
        else:
            output[name] = [
                rows.view(*own.shape[:-1], -1) if own.dim() > 2 else rows
                for rows, own in zip(full, pooled, strict=True)
            ]
        return output, tables

    def _tell(self, modality: str, layouts: Sequence[Sequence[ImageLayout]], steps: Sequence[EncodeStep]) -> None:
        encoder = self._backbone.vision
        flat = tuple(layout for own in layouts for layout in own)
        prefix = 0 if encoder is None else encoder.select_prefix
        self._plan.hooks.observe_encode(EncodeEvent(modality, flat, tuple(steps), prefix))

    @contextmanager
    def _inside(self, run: EncodeRun) -> Iterator[None]:
        """Let `run` call the encoder's layers, and see what the projector gets if a stage asks for it."""
        vision = self._backbone.vision
        assert self._stand_in is not None
        assert vision is not None
        self._stand_in.install(run.layer)
        asked = vision.projector is not None and "features" in self._plan.encode_at
        handle = None
        if asked:
            handle = vision.projector.register_forward_pre_hook(lambda _, args: (run.features(args[0]), *args[1:]))
        try:
            yield
        finally:
            self._stand_in.remove()
            if handle is not None:
                handle.remove()


def plain_flags(
    backbone: Backbone, modality: str, output: Any, arguments: Mapping[str, Any]
) -> list[Float[Tensor, "rows flags"]]:
    """Flags of features from which no stage has dropped anything."""
    entries = _entries(_features(output)[1])
    tables, first = [], 0
    for own, rows in zip(_layouts_of(backbone, modality, output, arguments), entries, strict=True):
        tables.append(flags(own, first, rows.device))
        first += len(own)
    return tables


def with_flags(output: Any, tables: Sequence[Float[Tensor, "rows flags"]]) -> FlowFeatures:
    """The output with its flags attached, one table per entry of the features."""
    return _copy(output, [*(output.get("deepstack_features") or ()), list(tables)])


def _copy(output: Any, deepstack: list[Any] | None) -> FlowFeatures:
    """A copy that may hold flags, with every field that the model's own class of output has."""
    copy = FlowFeatures(pooler_output=output.get("pooler_output"), deepstack_features=deepstack)
    for name, value in output.items():
        if name not in ("pooler_output", "deepstack_features"):
            copy[name] = value
    return copy


def take_flags(backbone: Backbone, encoded: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Separate the flags, by modality, from `mm_encoder_outputs`; made anew where this engine did not encode.

    The caller's objects are left as they are: `generate` without a cache passes them again at every step.
    """
    plain, tables = dict(encoded), {}
    for modality, output in encoded.items():
        if isinstance(output, FlowFeatures):
            *deepstack, own = output.deepstack_features
            tables[modality] = torch.cat(list(own))
            plain[modality] = _copy(output, deepstack or None)
        elif output is not None:
            tables[modality] = torch.cat(plain_flags(backbone, modality, output, {}))
    return plain, tables


def _features(output: Any) -> tuple[str, Any]:
    """The projected features and the field they are in; models without a vision encoder have them in the first."""
    pooled = output.get("pooler_output")
    return ("pooler_output", pooled) if pooled is not None else ("last_hidden_state", output["last_hidden_state"])


def _entries(pooled: Any) -> list[Float[Tensor, "rows dim"]]:
    """Features entry by entry: a list, or a tensor with or without a dimension for entries."""
    entries = [pooled] if isinstance(pooled, Tensor) and pooled.dim() == 2 else list(pooled)
    return [rows.flatten(0, -2) if rows.dim() > 2 else rows for rows in entries]


def _layouts_of(
    backbone: Backbone, modality: str, output: Any, arguments: Mapping[str, Any]
) -> list[list[ImageLayout]]:
    """The images in features from which no stage has dropped anything."""
    pooled = _features(output)[1]
    sizes = [len(rows) for rows in _entries(pooled)]
    return _layouts(backbone, modality, sizes, arguments, isinstance(pooled, Tensor))


def _layouts(
    backbone: Backbone, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any], stacked: bool
) -> list[list[ImageLayout]]:
    """What the adapter says of the entries, checked."""
    layouts = backbone.layouts(modality, sizes, arguments)
    told = [sum(layout.tokens for layout in own) for own in layouts]
    if told != list(sizes):
        raise UnsupportedModel(
            f"{type(backbone).__name__}.layouts: says that the entries of the {modality} features have {told} rows, "
            f"but they have {list(sizes)}" + (" (a stacked tensor)" if stacked else "") + "; correct the adapter"
        )
    for layout in (layout for own in layouts for layout in own):
        if layout.grid is not None and layout.grid[0] * layout.grid[1] != layout.patches:
            raise UnsupportedModel(
                f"{type(backbone).__name__}.layouts: gives the grid {layout.grid} to an image of {layout.patches} "
                "patches; correct the adapter's grid or extra rows"
            )
    return layouts

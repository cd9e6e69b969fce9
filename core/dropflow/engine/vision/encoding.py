"""The vision side of a call: `encode` stages inside the encoder and on its output, and how their answers travel.

A row dropped by an `encode` stage stays in the features as a row that is not live, so that placeholders, position ids,
deepstack features and multimodal RoPE stay aligned. The flags of every row (see `row_flags.py`) record this, and to
which image the row belongs. `generate` encodes images before the forward and may expand or slice the features in
between. The flags therefore travel as an extra entry of `deepstack_features`, which transformers expands and slices
with the features, and are removed before the model sees them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dropflow.backbone.image_layout import ImageLayout
from dropflow.engine.decoder.site import Site
from dropflow.engine.tokens.row_flags import RowFlags
from dropflow.engine.vision.frames import check_videos, frames_of, video_of
from dropflow.engine.vision.vision_run import VisionRun
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.lifecycle.events import EncodeEvent, EncodeStep

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.lifecycle.videos import Frames


F = TypeVar("F", bound="Features")
attached_plans: dict[int, Callable[[], bool]] = {}
"""`Plan.serial` of every policy that is attached to a model -> whether it is in force.

A policy that is being detached is no longer in force before the first of its hooks is gone.
"""


def in_force(plan: int) -> bool:
    """Whether the policy with this `Plan.serial` governs the calls of a model."""
    asked = attached_plans.get(plan)
    return asked is not None and asked()


@dataclass
class Features(BaseModelOutputWithPooling):  # type: ignore[misc]  # transformers ships no types
    """Encoded images in the form that a core accepts."""

    deepstack_features: Any = None


@dataclass
class FlowFeatures(Features):
    """Encoded images with the packed flags of their rows as the last entry of `deepstack_features`.

    Dropped rows hold zeros, so no model may read the features once the policy is detached.
    """

    def __getattribute__(self, name: str) -> Any:
        if (
            name in ("pooler_output", "last_hidden_state")
            and _read_by_a_model(sys._getframe(1))
            and not in_force(self.flags().plan)
        ):
            refuse_detached()
        return super().__getattribute__(name)

    @property
    def losses(self) -> Sequence[Tensor]:
        """Terms that stages add to the loss of training."""
        found: Sequence[Tensor] = self.__dict__.get("stage_losses", ())
        return found

    def flags(self) -> RowFlags:
        """Flags of all rows."""
        fields = self.__dict__
        return RowFlags.unpack(torch.cat(list(fields["deepstack_features"][-1])), fields.get("known"))


def refuse_detached() -> NoReturn:
    """Refuse features of a policy that is no longer attached."""
    raise UnsupportedCall(
        "mm_encoder_outputs: these features were encoded under a policy that has since been detached; encode the "
        "images again"
    )


def _read_by_a_model(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("transformers.models.")


def encode(
    site: Site, run: VisionRun | None, modality: str, features: Callable[[], Any], arguments: Mapping[str, Any]
) -> tuple[Any, list[RowFlags]]:
    """Call `features()` and the `encode` stages; return its output with one row per placeholder, and the flags.

    `run` is the pass that the encoder's layers take part in while `features()` runs; `None` for a policy without
    `encode` stages. `arguments` are those of the model's own method. There is one set of flags per entry of features.
    """
    backbone, hooks = site.backbone, site.plan.hooks
    pooled: Any = None
    layouts: list[list[ImageLayout]] = []

    def layouts_of(sizes: Sequence[int]) -> list[list[ImageLayout]]:
        layouts[:] = _layouts(backbone, modality, sizes, arguments, isinstance(pooled, Tensor))
        return layouts

    if run is not None:
        run.layouts_of = layouts_of
    output = features()
    if run is None:
        if hooks.watched("observe_encode"):
            own = _layouts_of(backbone, modality, output, arguments)
            _tell(site, modality, own, (), frames_of(backbone, modality, list(map(len, own)), arguments))
        return output, plain_flags(site, modality, output, arguments)
    name, pooled = _features(output)
    full, flags = run.finish(_entries(pooled))
    if run.steps is not None:
        _tell(site, modality, layouts, run.steps, run.videos)
    if isinstance(pooled, Tensor):
        output[name] = full[0] if pooled.dim() == 2 else torch.stack(full)
    else:
        output[name] = [
            rows.view(*own.shape[:-1], -1) if own.dim() > 2 else rows for rows, own in zip(full, pooled, strict=True)
        ]
    return output, flags


def _tell(
    site: Site,
    modality: str,
    layouts: Sequence[Sequence[ImageLayout]],
    steps: Sequence[EncodeStep],
    videos: Frames | None,
) -> None:
    encoder = site.backbone.vision
    flat = tuple(layout for own in layouts for layout in own)
    prefix = 0 if encoder is None else encoder.select_prefix
    site.plan.hooks.observe_encode(EncodeEvent(modality, flat, tuple(steps), prefix, videos or ()))


def plain_flags(site: Site, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[RowFlags]:
    """Flags of features from which no stage has dropped any rows."""
    found, first, videos = [], 0, {}
    layouts = _layouts_of(site.backbone, modality, output, arguments)
    if site.plan.reads_videos:
        check_videos(site.backbone, site.plan, modality)
        frames = frames_of(site.backbone, modality, list(map(len, layouts)), arguments)
        if frames is None:
            raise UnsupportedCall(
                f"mm_encoder_outputs: the {modality} features do not say which frames belong to which video; pass the "
                "pixels, or encode them while the policy is attached"
            )
        videos = video_of(frames)
    for own, rows in zip(layouts, _entries(_features(output)[1]), strict=True):
        found.append(RowFlags.of(own, first, site.plan.serial, rows.device, videos=videos))
        first += len(own)
    return found


def joined(flags: Sequence[RowFlags]) -> RowFlags:
    """The flags of all entries of the features, joined."""
    return flags[0].joined(flags[1:])


def with_flags(output: Any, flags: Sequence[RowFlags], losses: Sequence[Tensor] = ()) -> FlowFeatures:
    """The output with its flags attached, and with the losses that the stages returned."""
    whole = joined(flags)
    packed = [own.pack(whole) for own in flags]
    own: Any = type(output)
    kind: type[FlowFeatures] = _with_fields_of(FlowFeatures, own)
    features = _copied(kind, output, [*(output.get("deepstack_features") or ()), packed])
    features.__dict__["known"] = whole
    if losses:
        features.__dict__["stage_losses"] = tuple(losses)
    return features


@lru_cache(maxsize=64)
def _with_fields_of(kind: Any, own: Any) -> Any:
    """`kind` with the defaults of a model's output class, which its core may read although `generate` left them out."""
    fields = dataclasses.fields(own) if dataclasses.is_dataclass(own) else ()
    known = {one.name: one.default for one in fields if one.default is not dataclasses.MISSING}
    known |= {name: value for name, value in vars(own).items() if name in getattr(own, "more_fields", ())}
    more = tuple(name for name in known if not hasattr(kind, name))
    if not more:
        return kind
    return type(kind.__name__, (kind,), {"more_fields": more} | {name: known[name] for name in more})


def _copied(kind: type[F], output: Any, deepstack: list[Any] | None) -> F:
    """A copy of the output with every field of the model's own output class."""
    copy = kind(pooler_output=output.get("pooler_output"), deepstack_features=deepstack)
    for name, value in output.items():
        if name not in ("pooler_output", "deepstack_features"):
            copy[name] = value
    for name, value in vars(output).items():  # what a core may read, whether or not it is a key
        if name not in ("known", "stage_losses") and name not in vars(copy):
            setattr(copy, name, value)
    return copy


def take_flags(
    site: Site, encoded: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, RowFlags]]:
    """Separate the flags, by modality, from `mm_encoder_outputs`; create them if the engine did not encode the images.

    `arguments` are those of the core. The caller's objects are not changed, because `generate` without a cache passes
    them again at every step. Raises `UnsupportedCall` for features that were encoded under another policy, or before
    this one was detached and attached again.
    """
    plain, flags = dict(encoded), {}
    for modality, output in encoded.items():
        if isinstance(output, FlowFeatures):
            flags[modality] = output.flags()
            own: Any = type(output)
            plain[modality] = _copied(
                _with_fields_of(Features, own), output, list(output.deepstack_features[:-1]) or None
            )
            if flags[modality].plan != site.plan.serial:
                raise UnsupportedCall(
                    f"mm_encoder_outputs: the {modality} features were not encoded under this attachment of "
                    f"{site.plan.policy.name!r}, but under another policy or before it was detached; pass the pixels, "
                    "or encode them again"
                )
        elif output is not None:
            flags[modality] = joined(plain_flags(site, modality, output, arguments))
    return plain, flags


def _features(output: Any) -> tuple[str, Any]:
    """The name of the field with the projected features, and the features; the first field if there is no encoder."""
    pooled = output.get("pooler_output")
    return ("pooler_output", pooled) if pooled is not None else ("last_hidden_state", output["last_hidden_state"])


def _entries(pooled: Any) -> list[Float[Tensor, "rows dim"]]:
    """Features by entry, from a list or from a tensor with or without an entry dimension."""
    entries = [pooled] if isinstance(pooled, Tensor) and pooled.dim() == 2 else list(pooled)
    return [rows.flatten(0, -2) if rows.dim() > 2 else rows for rows in entries]


def _layouts_of(
    backbone: Backbone, modality: str, output: Any, arguments: Mapping[str, Any]
) -> list[list[ImageLayout]]:
    """The layouts of the images in features from which no stage has dropped any rows."""
    pooled = _features(output)[1]
    sizes = [len(rows) for rows in _entries(pooled)]
    return _layouts(backbone, modality, sizes, arguments, isinstance(pooled, Tensor))


def _layouts(
    backbone: Backbone, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any], stacked: bool
) -> list[list[ImageLayout]]:
    """The layouts that the adapter states for the entries, checked."""
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
                f"{type(backbone).__name__}.layouts: states the grid {layout.grid} for an image of {layout.patches} "
                "patches; correct the adapter's grid or extra rows"
            )
    return layouts

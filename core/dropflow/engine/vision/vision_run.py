"""One pass through the vision encoder under a policy: which rows remain, and which placeholder each of them fills."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from dropflow.backbone.image_layout import ImageLayout, split
from dropflow.engine.decoder.site import Site
from dropflow.engine.decoder.trained import checked_loss
from dropflow.engine.model.arguments import Arguments, with_hidden
from dropflow.engine.model.attention import QueryKey
from dropflow.engine.model.sublayers import in_two
from dropflow.engine.model.tap import tapped, uncompiled, untapped
from dropflow.engine.model.turns import refuse_own_model
from dropflow.engine.tokens.row_flags import RowFlags
from dropflow.engine.vision.frames import check_videos, frames_of, video_of
from dropflow.engine.vision.merges import Merges
from dropflow.engine.vision.packed_run import PackedRun
from dropflow.engine.vision.rows import Decided, Rows, raise_faults
from dropflow.engine.vision.tower_layer import TowerLayer
from dropflow.engine.vision.tower_reading import TowerReading
from dropflow.errors import DecisionError, UnsupportedCall, UnsupportedModel
from dropflow.lifecycle.asked_rows import check_layer
from dropflow.lifecycle.events import EncodeStep
from dropflow.lifecycle.payloads import EncodeCall

if TYPE_CHECKING:
    from dropflow.backbone.backbone import VisionEncoder
    from dropflow.backbone.vision_reader import VisionReader
    from dropflow.lifecycle.stage import EncodeBoundary
    from dropflow.lifecycle.videos import Frames


class VisionRun:
    """State of one call of `get_image_features` or `get_video_features`, with its arguments."""

    def __init__(self, site: Site, modality: str, arguments: Mapping[str, Any], brought: str | None = None) -> None:
        """`brought` is what the call brings, where a model encodes its videos with the method for images."""
        plan, self._modality, self._arguments = site.plan, brought or modality, arguments
        check_videos(site.backbone, plan, self._modality)
        self._site, self._plan = site, plan
        self._vision: VisionEncoder | None = site.backbone.vision
        tower = site.backbone.packed_tower if any(map(in_tower, plan.encode_at)) else None
        self.packed = None if tower is None else PackedRun(tower, self._decide_units, frozenset(plan.encode_at))
        """The pass through a packed tower; `None` for other towers, or if no stage works before or inside it."""
        reader = site.backbone.reader(modality) if self._vision is None and self.packed is None else None
        self._reading = None if reader is None else TowerReading(reader, arguments)
        """What a tower shows in which no stage can work; `None` where stages can, or nothing is known."""
        self._tower: VisionEncoder | VisionReader | None = self._vision or reader
        self._taps = {self._absolute(layer) for _, stage in plan.stages for layer in stage.vision_taps}
        self._extra = 0
        """Number of prefix tokens that are still present in the encoder's output and become rows."""
        self._tapped: dict[int, QueryKey] = {}
        self._seen: list[list[Rows]] = []
        """The rows that the attention of each layer has seen, for the layers that have run."""
        self._features: list[Rows] | None = None
        """Rows of the projector's input features, once their layer has run."""
        self._prefix_rows: Tensor | None = None
        """Prefix rows (images, prefix, dim) of these features."""
        self._rows: list[Rows] = []
        self._merges = Merges()
        self._carries = max((columns.stop for columns in plan.carries.values()), default=0)
        """Numbers that every row carries for stages, those of all stages together."""
        self._sizes: list[int] = []
        self._grids: list[tuple[int, int] | None] = []
        self.videos: Frames | None = ()
        """Frames of each video among the images; `None` where nobody says."""
        self._ran: list[Tensor] = []
        """For each patch of each image, the share of the encoder's layers that run on it."""
        self._faults: list[tuple[Tensor, DecisionError]] = []
        """Faults of the decisions, checked when the features are finished."""
        self.layouts_of: Callable[[Sequence[int]], list[list[ImageLayout]]] = lambda _: []
        """Returns the images in entries of the features of given sizes."""
        self.asking = False
        """True while a stage runs."""
        self.losses: list[Tensor] = []
        """Terms that stages add to the loss of training."""
        self.steps: list[EncodeStep] | None = [] if plan.hooks.watched("observe_encode") else None
        """What the stages decided; `None` without observers."""

    @property
    def reduces_features(self) -> bool:
        """Whether any stage works on the projector's input."""
        return "features" in self._plan.encode_at

    @property
    def inside(self) -> bool:
        """Whether any stage works inside the encoder or reads its attention."""
        return bool(self._taps) or any(boundary is not None for boundary in self._plan.encode_at)

    def tower(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run a packed tower, whose `forward` takes `arguments` by name, on the units that the stages keep."""
        packed = self.packed
        if packed is None:
            return forward(**arguments)
        if self.asking or packed.ran:
            refuse_own_model(type(packed.tower.owner).__name__)
        pixels, sizes = arguments[packed.tower.pixels], list(packed.tower.sizes(arguments))
        if sum(sizes) * packed.tower.unit != len(pixels):
            raise UnsupportedCall(
                f"{packed.tower.pixels}: {len(pixels)} patches, but the grids of the pictures have "
                f"{sum(sizes) * packed.tower.unit}; pass what the processor made"
            )
        entries = self.layouts_of(sizes)
        layouts = [layout for own in entries for layout in own]
        self._begin([layout.patches for layout in layouts], pixels)
        self._grids = [layout.grid for layout in layouts]
        self._group([len(own) for own in entries])
        return packed.forward(forward, arguments)

    def leaves(self, number: int) -> bool:
        """Whether no stage reads a layer of a tower in which none works; in others every layer counts its rows."""
        return self._reading is not None and number not in self._taps and not self.asking

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run vision layer `number` on the rows that the stages kept."""
        if self.asking:
            refuse_own_model(type(layer).__name__)
        if self.packed is not None:
            return self.packed.layer(number, layer, args, kwargs)
        vision = self._vision
        if vision is None:
            return self._read(number, layer, args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            self._begin([hidden.shape[1] - vision.prefix] * hidden.shape[0], hidden)
            self._group([1] * hidden.shape[0])
        hidden = self._decide_inside(number, hidden)
        arguments = self._masked(*with_hidden(hidden, args, kwargs), hidden)
        self._seen.append(list(self._rows))
        if number in self._taps:
            implementation = vision.owner.config._attn_implementation
            output = tapped(
                implementation,
                partial(self._keep_tapped, number),
                lambda: self._run(number, layer, arguments, tapped=True),
            )
        else:
            output = self._run(number, layer, arguments, tapped=False)
        if number == vision.feature_layer - 1:
            self._features, self._prefix_rows = list(self._rows), output[:, : vision.prefix]
        return output

    def _read(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a tapped layer of a tower in which no stage works."""
        assert self._reading is not None
        config = self._reading.reader.owner.config
        keep, call = partial(self._keep_tapped, number), uncompiled(layer)
        return tapped(config._attn_implementation, keep, lambda: call(*args, **kwargs))

    def _run(self, number: int, layer: nn.Module, arguments: Arguments, *, tapped: bool) -> Any:
        args, kwargs = arguments
        if not self._plan.encode_at.get(number + 0.5):
            return (uncompiled(layer) if tapped else layer)(*args, **kwargs)
        assert self._vision is not None
        assert self._vision.sublayers is not None  # the policy is refused otherwise
        parts, between = self._vision.sublayers(layer), partial(self._decide_inside, number + 0.5)
        return in_two(layer, parts, arguments, between, self._site.shadows)

    def features(self, rows: Float[Tensor, "images rows dim"]) -> Float[Tensor, "images rows dim"]:
        """The projector's input instead of `rows`: the features after the stages at `features`."""
        if self._features is None or self._vision is None or self._prefix_rows is None or self.asking:
            return rows  # the projector is being called for another purpose
        self._rows, stages = self._features, self._plan.encode_at["features"]
        own = [row[: len(left.places)] for row, left in zip(rows, self._rows, strict=True)]
        decided = self._decide("features", own, stages, self._prefix_rows, self._vision.prefix)
        self._prefix_rows = None  # done: the projector's hook and its forward both ask
        self._features = list(self._rows)
        return pad_sequence(decided, batch_first=True)

    def finish(self, entries: Sequence[Tensor]) -> tuple[list[Tensor], list[RowFlags]]:
        """Ask the output stages; return features with one row per placeholder, and the flags, by entry."""
        vision, extra = self._vision, 0
        if self._features is not None:
            assert vision is not None
            self._extra = extra = vision.select_prefix
            self._rows = [rows.after(extra) for rows in self._features]
            self._sizes = [size + extra for size in self._sizes]
            layouts = self.layouts_of(self._sizes)
            features = [f[: len(r.places)] for f, r in zip(entries, self._rows, strict=True)]
            whole = list(features)
        else:
            layouts = self.layouts_of([len(rows) for rows in entries])
            parts = list(split(entries, layouts))
            whole = [rows for _, rows in parts]
            features = [rows[layout.patch_rows(rows.device)] if layout.has_extra else rows for layout, rows in parts]
            if self.packed is None:
                self._begin([layout.patches for own in layouts for layout in own], entries[0])
                if self._reading is not None:
                    self._reading.begin([len(rows) for rows in entries], layouts)
            else:
                self.packed.check_ran()
                features = [own[rows.places.to(own.device)] for own, rows in zip(features, self._rows, strict=True)]
        self._group([len(own) for own in layouts])
        stages = self._plan.encode_at.get(None, ())
        if stages:
            self._grids = [layout.grid for own in layouts for layout in own]
            none = features[0].new_zeros(len(features), 0, features[0].shape[-1]) if features else entries[0][None, :0]
            prefix = 0 if self._reading is None else self._reading.reader.prefix
            features = self._decide(None, features, stages, none, prefix if vision is None else vision.prefix - extra)
        raise_faults(self._faults)
        return self._refilled(layouts, whole, features, entries[0][:0])

    def _refilled(
        self,
        layouts: Sequence[Sequence[ImageLayout]],
        whole: Sequence[Tensor],
        features: Sequence[Tensor],
        empty: Tensor,
    ) -> tuple[list[Tensor], list[RowFlags]]:
        """Entries with a row for every placeholder (zeros for dropped rows, which are never live), and their flags."""
        full, flags, first, videos = [], [], 0, video_of(self.videos)
        for own in layouts:
            last = first + len(own)
            rows = [left.to(empty.device) for left in self._rows[first:last]]
            parts = [_filled(*each) for each in zip(own, rows, whole[first:last], features[first:last], strict=True)]
            full.append(parts[0] if len(parts) == 1 else torch.cat(parts) if parts else empty)
            flags.append(
                RowFlags.of(
                    own,
                    first,
                    self._plan.serial,
                    full[-1].device,
                    [_scattered(torch.ones_like(r.protected), r, layout) for r, layout in zip(rows, own, strict=True)],
                    [_scattered(r.protected, r, layout) for r, layout in zip(rows, own, strict=True)],
                    [_scattered(r.carried, r, layout) for r, layout in zip(rows, own, strict=True)],
                    [pad(share, (self._extra, 0), value=1.0) for share in self._ran[first:last]],
                    self._carries,
                    videos,
                )
            )
            first = last
        return full, flags

    def _keep_tapped(self, number: int, seen: QueryKey) -> None:
        seen = replace(seen, causal=False, value=None)
        if self._site.shards is not None and self._tower is not None:
            config = self._tower.owner.config
            heads = int(getattr(config, "num_attention_heads", None) or config.num_heads)
            seen = replace(seen, shards=self._site.shards, heads=heads, kv_heads=heads)
        if self._reading is not None:
            self._reading.keep(number, seen)
        else:
            self._tapped[number] = seen

    def _begin(self, sizes: Sequence[int], like: Tensor) -> None:
        self._sizes = list(sizes)
        self._grids = [self._site.backbone.grid(size) for size in sizes]
        self._rows = [Rows.whole(n, like, self._carries) for n in sizes]
        self._ran = [torch.ones(n, device=like.device) for n in sizes]

    def _group(self, entries: Sequence[int]) -> None:
        """Note which images are frames of which video; `entries` are the images in each entry of the features."""
        self.videos = frames_of(self._site.backbone, self._modality, entries, self._arguments)

    def _masked(self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Arguments:
        """Arguments of a layer with the mask that its rows require, if any."""
        mask = self._mask(hidden)
        if mask is None:
            return args, kwargs
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, kwargs | {"attention_mask": mask}

    def _mask(self, hidden: Tensor) -> Tensor | None:
        """A mask that hides the padding of images with fewer rows and weights merged rows by their sizes.

        `None` if all images have the same number of rows and no row counts more than once.
        """
        assert self._vision is not None
        prefix, implementation = self._vision.prefix, self._vision.owner.config._attn_implementation
        counts = [len(rows.places) for rows in self._rows]
        weighs = any(rows.proportional for rows in self._rows)
        if len(set(counts)) == 1 and not weighs:
            return None
        seen = torch.zeros(len(counts), hidden.shape[1], dtype=torch.bool, device=hidden.device)
        for image, count in enumerate(counts):
            seen[image, : prefix + count] = True
        if "flash" in implementation:
            if weighs:
                raise UnsupportedModel(
                    "vision encoder: flash attention cannot weigh merged rows by their sizes; load the vision tower "
                    "with 'sdpa' or 'eager' attention, or switch proportional attention off"
                )
            return seen
        wide = seen[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)
        if implementation != "eager" and not weighs:
            return wide
        bias = torch.zeros(seen.shape, device=hidden.device)
        for image, rows in enumerate(self._rows):
            if rows.proportional:
                bias[image, prefix : prefix + len(rows.places)] = rows.sizes.float().log()
        bias = bias.to(hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        return bias[:, None, None, :].expand_as(wide)

    def _decide_inside(self, boundary: int | float, hidden: Tensor) -> Tensor:
        """Hidden states (images, prefix + rows, dim) after the stages at a boundary of the encoder."""
        stages = self._plan.encode_at.get(boundary, ())
        if not stages:
            return hidden
        assert self._vision is not None
        prefix = hidden[:, : self._vision.prefix]
        own = [hidden[i, prefix.shape[1] :][: len(rows.places)] for i, rows in enumerate(self._rows)]
        decided = self._decide(boundary, own, stages, prefix, prefix.shape[1])
        return torch.cat((prefix, pad_sequence(decided, batch_first=True)), 1)

    def _decide(
        self,
        boundary: EncodeBoundary,
        features: list[Tensor],
        stages: Sequence[tuple[str, Any]],
        prefix_rows: Tensor,
        prefix: int,
    ) -> list[Tensor]:
        """Ask the stages one after the other; each sees the rows that the one before has kept."""
        device = features[0].device if features else prefix_rows.device
        self._rows = [rows.to(device) for rows in self._rows]
        for name, stage in stages:
            call = EncodeCall(
                boundary=boundary,
                features=tuple(features),
                prefix_rows=prefix_rows.to(device),
                places=tuple(rows.places for rows in self._rows),
                sizes=tuple(rows.sizes for rows in self._rows),
                grids=tuple(self._grids),
                prefix=prefix,
                has_cls=self._tower is not None and self._tower.has_cls,
                tower=self._layer,
                members=self._members,
                weights=self._weights,
                videos=self.videos,
                separate=self._reading is None,
                training=self._site.training,
                **self._site.trained.given(name),
            )
            with self._asked():
                answer = self._plan.hooks.encode(call, stage)
            if answer is not None:
                self.losses += checked_loss(answer.loss if call.training else None, name, "encode")
                present, before = self._rows, tuple(rows.places for rows in self._rows)
                if answer.proportional and self.packed is not None and boundary is not None:
                    raise DecisionError(
                        f"stages.{name}: `encode` returned proportional=True, but the blocks of a packed vision tower "
                        "take no mask that could weigh merged rows by their sizes; return proportional=False"
                    )
                decided = Decided(answer, f"stages.{name}", self._plan.carries[name])
                features, self._rows = decided.apply(features, self._rows)
                self._faults += decided.faults
                if answer.rows is not None:
                    self._merges.add(name, present, self._rows, answer, self.videos or ())
                if boundary is not None and (answer.keep is not None or answer.rows is not None):
                    self._leave(self._share(boundary), before)
                if self.steps is not None and answer.decides:
                    places, protected = zip(*((r.places, r.protected) for r in self._rows), strict=True)
                    self.steps.append(EncodeStep(boundary, name, before, answer, places, protected))
        return features

    def _share(self, boundary: EncodeBoundary) -> float:
        """Share of the encoder's layers that come before a place."""
        if not isinstance(boundary, int | float):
            return float(boundary == "features")
        encoder = self._vision if self.packed is None else self.packed.tower
        assert encoder is not None  # or else no stage works before a layer
        return boundary / encoder.depth

    def _leave(self, share: float, before: Sequence[Tensor]) -> None:
        """Note for rows that are gone that only this share of the layers ran on them; `before` are all places."""
        for image, (places, left) in enumerate(zip(before, self._rows, strict=True)):
            ran = self._ran[image].to(places.device)
            stay = left.places.clamp(max=len(ran) - 1)  # faults are raised later
            self._ran[image] = ran.index_fill(0, places, share).index_copy(0, stay, ran[stay])

    def _decide_units(self, boundary: EncodeBoundary, units: Tensor) -> tuple[Tensor, Tensor] | None:
        """`PackedRun`'s `Decide`."""
        stages, before = self._plan.encode_at[boundary], self._rows
        features = list(torch.split(units, [len(rows.places) for rows in before]))
        decided = self._decide(boundary, features, stages, units.new_zeros(len(features), 0, units.shape[1]), 0)
        raise_faults(self._faults)
        self._faults = []
        pairs = list(zip((rows.to(units.device) for rows in before), self._rows, strict=True))
        if all(len(now.places) == len(then.places) and now.rewritten == then.rewritten for then, now in pairs):
            return None
        numbers, first = [], 0
        for then, now in pairs:
            numbers.append(torch.searchsorted(then.places, now.places) + first)
            first += len(then.places)
        return torch.cat(decided), torch.cat(numbers)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Mark that a stage is running, so that models it calls are not taken for this run."""
        self.asking = True
        with untapped():
            yield
        self.asking = False

    def _absolute(self, layer: int) -> int:
        return layer if layer >= 0 or self._tower is None else layer + self._tower.depth

    def _layer(self, layer: int) -> TowerLayer:
        """What vision layer `layer` computed."""
        check_layer(layer)
        number, found = self._absolute(layer), None
        if self._reading is not None:
            found = self._reading.layer(number)
        elif number in self._tapped and self._vision is not None:
            counts = tuple(len(rows.places) for rows in self._seen[number])
            found = TowerLayer((self._tapped[number],), counts, self._vision.prefix)
        if found is None:
            raise DecisionError(
                f"attention of vision layer {layer}: list the layer in the stage's `vision_taps`, and ask for it at a "
                "boundary after it"
            )
        return found

    def _members(self, layer: int) -> tuple[Tensor, ...]:
        """Rows of vision layer `layer` that the present rows of each image are, or are made of."""
        seen = self._layer(layer)
        if self._reading is not None:
            tables = self._reading.members(seen)
            then = [Rows.whole(len(table), table) for table in tables]
        else:
            assert self._vision is not None  # a policy with vision taps is refused without one
            then = [rows.after(self._extra) for rows in self._seen[self._absolute(layer)]]
            first, width = self._vision.prefix - self._extra, seen.parts[0].key.shape[2]
            tables = tuple(
                torch.arange(len(rows.places), device=rows.places.device)[:, None] + first + image * width
                for image, rows in enumerate(then)
            )
        return self._merges.followed(tables, then, self._rows)

    def _weights(self, layer: int) -> tuple[Tensor, ...] | None:
        """The weights of `_members` in the present rows; `None` where they are not told apart."""
        tables = None if self._reading is None else self._reading.weights(self._layer(layer))
        if tables is None:
            return None
        return self._merges.followed(tables, [Rows.whole(len(table), table) for table in tables], self._rows)


def in_tower(boundary: EncodeBoundary) -> bool:
    """Whether a place is before a vision tower or before one of its layers."""
    return boundary == "pixels" or isinstance(boundary, int | float)


def _scattered(values: Tensor, rows: Rows, layout: ImageLayout) -> Tensor:
    """Values of an image's rows (rows, ...) at the patches they represent (patches, ...), zeros elsewhere."""
    return values.new_zeros(layout.patches, *values.shape[1:]).index_copy(0, rows.places, values)


def _filled(layout: ImageLayout, rows: Rows, whole: Tensor, own: Tensor) -> Tensor:
    """The rows of one image (layout.tokens, dim): `own` at their places, extra rows unchanged, zeros elsewhere."""
    if len(own) == layout.tokens:
        return own
    patch = layout.patch_rows(own.device)
    full = own.new_zeros(layout.tokens, own.shape[1]).index_copy(0, patch[rows.places], own)
    return torch.where(layout.extra(own.device)[:, None], whole, full) if layout.has_extra else full

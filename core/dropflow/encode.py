"""One pass through the vision encoder under a policy: which rows are left, and which placeholder each one fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dropflow.attention import QueryKey, row_attention
from dropflow.errors import DecisionError
from dropflow.events import EncodeStep
from dropflow.payloads import Encode, EncodeCall
from dropflow.tap import tap, uncompiled
from dropflow.views import View, flags, split

if TYPE_CHECKING:
    from dropflow.backbone import Backbone
    from dropflow.plan import Plan


@dataclass(frozen=True, eq=False)
class Rows:
    """The patch rows of one image that are left at some point of the encoder."""

    places: Int[Tensor, "rows"]
    """Patch each row stands for, counted inside the image."""
    protected: Bool[Tensor, "rows"]
    rewritten: int = 0
    """How often a stage has put new rows, such as merged ones, in the place of old ones."""


class EncodeRun:
    """State of one call of `get_image_features`."""

    def __init__(self, plan: Plan, backbone: Backbone) -> None:
        self._plan, self._backbone = plan, backbone
        self._depth = 0 if backbone.vision is None else backbone.vision.depth
        self._taps = {self._absolute(layer) for _, stage in plan.stages for layer in stage.vision_taps}
        self._extra = 0
        """Prefix tokens that have become rows: those still present in the encoder's output."""
        self._tapped: dict[int, QueryKey] = {}
        self._at: list[list[Rows]] = []
        """Rows behind each layer that has run."""
        self._rows: list[Rows] = []
        self._sizes: list[int] = []
        self._grids: list[tuple[int, int] | None] = []
        self.steps: list[EncodeStep] | None = [] if plan.hooks.watched("observe_encode") else None
        """What the stages decided, if somebody watches."""

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run vision layer `number` on the rows the stages left."""
        encoder = self._backbone.vision
        assert encoder is not None
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            self._begin([hidden.shape[1] - encoder.prefix] * hidden.shape[0], hidden)
        implementation = encoder.owner.config._attn_implementation
        stages = self._plan.encode_at.get(number, ())
        if stages:
            counts = [len(rows.places) for rows in self._rows]
            features = [hidden[i, encoder.prefix : encoder.prefix + n] for i, n in enumerate(counts)]
            decided = self._decide(number, features, stages, encoder.prefix)
            hidden = torch.cat((hidden[:, : encoder.prefix], pad_sequence(decided, batch_first=True)), 1)
        mask = self._mask(hidden, encoder.prefix, implementation)
        if mask is not None:
            if len(args) > 1:
                args = (args[0], mask, *args[2:])
            else:
                kwargs = kwargs | {"attention_mask": mask}
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
        if number in self._taps:
            with tap(implementation, lambda seen: self._keep_tapped(number, seen)):
                output = uncompiled(layer)(*args, **kwargs)
        else:
            output = layer(*args, **kwargs)
        self._at.append(list(self._rows))
        return output

    def finish(
        self, entries: Sequence[Tensor], views_of: Callable[[Sequence[int]], list[list[View]]]
    ) -> tuple[list[Tensor], list[Float[Tensor, "rows 5"]]]:
        """Ask the output stages; returns features with one row per placeholder, and the flags, entry by entry.

        `views_of` says which images are inside entries of given sizes.
        """
        encoder, extra = self._backbone.vision, 0
        if self._at:
            assert encoder is not None
            extra = encoder.select_prefix
            self._extra = extra
            self._rows = [self._shifted(rows, extra) for rows in self._at[encoder.feature_layer - 1]]
            self._sizes = [size + extra for size in self._sizes]
            views = views_of(self._sizes)
            features = [f[: len(r.places)] for f, r in zip(entries, self._rows, strict=True)]
            whole = list(features)
        else:
            views = views_of([len(rows) for rows in entries])
            whole = [rows for _, rows in split(entries, views)]
            features = [
                rows[~view.extra(rows.device)] if view.has_extra else rows for view, rows in split(entries, views)
            ]
            self._begin([view.patches for own in views for view in own], entries[0])
        stages = self._plan.encode_at.get(None, ())
        if stages:
            self._grids = [view.grid for own in views for view in own]
            features = self._decide(None, features, stages, 0 if encoder is None else encoder.prefix - extra)
        return self._refilled(views, whole, features, entries[0][:0])

    def _refilled(
        self, views: Sequence[Sequence[View]], whole: Sequence[Tensor], features: Sequence[Tensor], empty: Tensor
    ) -> tuple[list[Tensor], list[Float[Tensor, "rows 5"]]]:
        """Entries with a row for every placeholder, zeros where it was dropped (those are never live), and flags."""
        full, tables, first = [], [], 0
        for own in views:
            last = first + len(own)
            rows, kept = self._rows[first:last], []
            for view, row in zip(own, rows, strict=True):
                keep = row.protected.new_zeros(view.patches)
                keep[row.places] = True
                kept.append(keep)
            parts = [_filled(*each) for each in zip(own, rows, whole[first:last], features[first:last], strict=True)]
            full.append(parts[0] if len(parts) == 1 else torch.cat(parts) if parts else empty)
            protected = [
                torch.zeros_like(k).index_copy(0, r.places, r.protected) for k, r in zip(kept, rows, strict=True)
            ]
            tables.append(flags(own, first, full[-1].device, kept, protected))
            first = last
        return full, tables

    def _keep_tapped(self, number: int, seen: QueryKey) -> None:
        self._tapped[number] = seen

    def _begin(self, sizes: Sequence[int], like: Tensor) -> None:
        self._sizes = list(sizes)
        self._grids = [self._backbone.grid(size) for size in sizes]
        self._rows = [
            Rows(torch.arange(n, device=like.device), torch.zeros(n, dtype=torch.bool, device=like.device))
            for n in sizes
        ]

    @staticmethod
    def _shifted(rows: Rows, extra: int) -> Rows:
        """Rows of a tower whose prefix tokens reach the LLM too: they fill the first placeholders."""
        if not extra:
            return rows
        first = torch.arange(extra, device=rows.places.device)
        return Rows(
            torch.cat((first, rows.places + extra)),
            torch.cat((torch.zeros_like(first).bool(), rows.protected)),
            rows.rewritten,
        )

    def _mask(self, hidden: Tensor, prefix: int, implementation: str) -> Tensor | None:
        """Hides the padding of images that have fewer rows than others; `None` where all have the same number."""
        counts = [len(rows.places) for rows in self._rows]
        if len(set(counts)) == 1:
            return None
        keys = torch.arange(hidden.shape[1], device=hidden.device)
        seen = keys < prefix + torch.tensor(counts, device=hidden.device)[:, None]
        if "flash" in implementation:
            return seen
        wide = seen[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)
        if implementation != "eager":
            return wide
        return torch.zeros_like(wide, dtype=hidden.dtype).masked_fill(~wide, torch.finfo(hidden.dtype).min)

    def _decide(
        self, boundary: int | None, features: list[Tensor], stages: Sequence[tuple[str, Any]], prefix: int
    ) -> list[Tensor]:
        """Ask the stages one after the other, each seeing the rows that the one before has left."""
        encoder = self._backbone.vision
        for name, stage in stages:
            call = EncodeCall(
                boundary=boundary,
                features=tuple(features),
                places=tuple(rows.places for rows in self._rows),
                grids=tuple(self._grids),
                prefix=prefix,
                has_cls=encoder is not None and encoder.has_cls,
                attention=self._attention,
                columns=self._columns,
            )
            answer = self._plan.hooks.encode(call, stage)
            if answer is not None:
                where = f"stages.{name}"
                applied = [
                    _apply(answer, i, f, r, where) for i, (f, r) in enumerate(zip(features, self._rows, strict=True))
                ]
                before = tuple(rows.places for rows in self._rows)
                features, self._rows = [f for f, _ in applied], [r for _, r in applied]
                if self.steps is not None:
                    places, protected = zip(*((r.places, r.protected) for r in self._rows), strict=True)
                    self.steps.append(EncodeStep(boundary, name, before, answer, places, protected))
        return features

    def _absolute(self, layer: int) -> int:
        return layer if layer >= 0 else layer + self._depth

    def _attention(self, layer: int, rows: Tensor) -> Tensor:
        number = self._absolute(layer)
        if number not in self._tapped:
            raise DecisionError(
                f"attention of vision layer {layer}: list the layer in the stage's `vision_taps`, and ask for it at a "
                "boundary behind it"
            )
        return row_attention(replace(self._tapped[number], causal=False), rows)

    def _columns(self, layer: int) -> tuple[Tensor, ...]:
        """Keys of vision layer `layer` that the present rows were when it ran."""
        encoder, number = self._backbone.vision, self._absolute(layer)
        assert encoder is not None  # a policy with vision taps is refused without one
        found = []
        for now, then in zip(self._rows, self._at[number], strict=True):
            if now.rewritten != then.rewritten:
                raise DecisionError(
                    f"attention of vision layer {layer}: rows were merged since it ran, so that no key stands for "
                    "them; read a layer behind the merging, or ask before it"
                )
            places = self._shifted(then, self._extra).places
            found.append(torch.searchsorted(places, now.places) + encoder.prefix - self._extra)
        return tuple(found)


def _filled(view: View, rows: Rows, whole: Tensor, own: Tensor) -> Tensor:
    """The rows of one image (view.tokens, dim): `own` in their places, extra rows as they were, zeros elsewhere."""
    if len(own) == view.tokens:
        return own
    patch = (~view.extra(own.device)).nonzero()[:, 0]
    full = own.new_zeros(view.tokens, own.shape[1]).index_copy(0, patch[rows.places], own)
    return torch.where(view.extra(own.device)[:, None], whole, full) if view.has_extra else full


def _apply(answer: Encode, image: int, features: Tensor, rows: Rows, where: str) -> tuple[Tensor, Rows]:
    """One image's part of a decision."""
    if answer.rows is not None:
        if answer.places is None or answer.keep is not None:
            raise DecisionError(f"{where}: `encode` returned rows; they go with `places`, and not with `keep`")
        features, places = answer.rows[image], answer.places[image]
        held = rows.protected.new_zeros(int(rows.places.max()) + 1).index_copy(0, rows.places, rows.protected)
        if (
            len(features) != len(places)
            or not bool(torch.isin(places, rows.places).all())
            or bool((places.diff() <= 0).any())
        ):
            raise DecisionError(
                f"{where}: `encode` returned {len(features)} rows and places {tuple(places.shape)} for image {image}; "
                "expected one place per row, ascending, out of the payload's places"
            )
        rows = Rows(places, held[places], rows.rewritten + 1)
    elif answer.keep is not None:
        keep = _fits(answer.keep[image], rows, image, where) | rows.protected
        features, rows = features[keep], replace(rows, places=rows.places[keep], protected=rows.protected[keep])
    if answer.protect is not None:
        rows = replace(rows, protected=rows.protected | _fits(answer.protect[image], rows, image, where))
    return features, rows


def _fits(mask: Tensor, rows: Rows, image: int, where: str) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != rows.places.shape:
        raise DecisionError(
            f"{where}: `encode` returned a mask of {mask.dtype} {tuple(mask.shape)} for image {image}, "
            f"expected torch.bool {tuple(rows.places.shape)}"
        )
    return mask

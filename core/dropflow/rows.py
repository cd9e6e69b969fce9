"""The patch rows of one image inside the vision side of a call, and how a stage's decision changes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.errors import DecisionError
from dropflow.payloads import Encode


@dataclass(frozen=True, eq=False)
class Rows:
    """The patch rows of one image that are left at some point of the encoder."""

    places: Int[Tensor, "rows"]
    """Patch each row stands for, counted inside the image."""
    protected: Bool[Tensor, "rows"]
    sizes: Float[Tensor, "rows"]
    """Patches each row is the mean of."""
    rewritten: int = 0
    """How often a stage has put new rows, such as merged ones, in the place of old ones."""
    proportional: bool = False
    """Whether the encoder's attention counts each row as often as its size says."""

    @classmethod
    def whole(cls, count: int, like: Tensor) -> Rows:
        """All patches of an image, none protected, on the device of `like`."""
        places = torch.arange(count, device=like.device)
        return cls(places, torch.zeros_like(places).bool(), torch.ones(count, device=like.device))

    def behind(self, extra: int) -> Rows:
        """Rows of a tower whose first `extra` prefix tokens reach the LLM too: they fill the first placeholders."""
        if not extra:
            return self
        first = Rows.whole(extra, self.places)
        return replace(
            self,
            places=torch.cat((first.places, self.places + extra)),
            protected=torch.cat((first.protected, self.protected)),
            sizes=torch.cat((first.sizes, self.sizes)),
        )


def apply(answer: Encode, image: int, features: Tensor, rows: Rows, where: str) -> tuple[Tensor, Rows]:
    """One image's part of a decision; raises `DecisionError` naming `where` if it does not fit."""
    if answer.rows is not None:
        if answer.places is None or answer.keep is not None:
            raise DecisionError(f"{where}: `encode` returned rows; they go with `places`, and not with `keep`")
        features, rows = answer.rows[image], _rewritten(answer, image, rows, where)
    elif answer.keep is not None:
        keep = _fits(answer.keep[image], rows, image, where) | rows.protected
        features = features[keep]
        rows = replace(rows, places=rows.places[keep], protected=rows.protected[keep], sizes=rows.sizes[keep])
    if answer.protect is not None:
        rows = replace(rows, protected=rows.protected | _fits(answer.protect[image], rows, image, where))
    return features, rows


def _rewritten(answer: Encode, image: int, rows: Rows, where: str) -> Rows:
    assert answer.rows is not None
    assert answer.places is not None
    features, places = answer.rows[image], answer.places[image]
    sizes = torch.ones(len(places), device=places.device) if answer.sizes is None else answer.sizes[image]
    if (
        len(features) != len(places)
        or len(sizes) != len(places)
        or not bool(torch.isin(places, rows.places).all())
        or bool((places.diff() <= 0).any())
    ):
        raise DecisionError(
            f"{where}: `encode` returned {len(features)} rows, places {tuple(places.shape)} and sizes "
            f"{tuple(sizes.shape)} for image {image}; expected one place and one size per row, the places ascending "
            "and out of the payload's places"
        )
    held = rows.protected.new_zeros(int(rows.places.max()) + 1).index_copy(0, rows.places, rows.protected)
    return Rows(places, held[places], sizes, rows.rewritten + 1, answer.proportional)


def _fits(mask: Tensor, rows: Rows, image: int, where: str) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != rows.places.shape:
        raise DecisionError(
            f"{where}: `encode` returned a mask of {mask.dtype} {tuple(mask.shape)} for image {image}, "
            f"expected torch.bool {tuple(rows.places.shape)}"
        )
    return mask

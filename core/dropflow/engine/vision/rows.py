"""The patch rows of one image inside the vision side of a call, and how a stage's decision changes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.errors import DecisionError
from dropflow.lifecycle.payloads import Encode


@dataclass(frozen=True, eq=False)
class Rows:
    """The patch rows of one image that are left at some point of the encoder."""

    places: Int[Tensor, "rows"]
    """Patch each row stands for, counted inside the image."""
    protected: Bool[Tensor, "rows"]
    sizes: Float[Tensor, "rows"]
    """Patches each row is the mean of."""
    carried: Float[Tensor, "rows carries"]
    """What stages gave each row to carry to the LLM, in the columns that `Plan.carries` says."""
    rewritten: int = 0
    """How often a stage has put new rows, such as merged ones, in the place of old ones."""
    proportional: bool = False
    """Whether the encoder's attention counts each row as often as its size says."""

    @classmethod
    def whole(cls, count: int, like: Tensor, carries: int = 0) -> Rows:
        """All patches of an image, none protected, on the device of `like`; they carry zeros."""
        places, device = torch.arange(count, device=like.device), like.device
        carried = torch.zeros(count, carries, device=device)
        return cls(places, torch.zeros_like(places).bool(), torch.ones(count, device=device), carried)

    def behind(self, extra: int) -> Rows:
        """Rows of a tower whose first `extra` prefix tokens reach the LLM too: they fill the first placeholders."""
        if not extra:
            return self
        first = Rows.whole(extra, self.places, self.carried.shape[1])
        return replace(
            self,
            places=torch.cat((first.places, self.places + extra)),
            protected=torch.cat((first.protected, self.protected)),
            sizes=torch.cat((first.sizes, self.sizes)),
            carried=torch.cat((first.carried, self.carried)),
        )


def apply(answer: Encode, image: int, features: Tensor, rows: Rows, where: str, columns: slice) -> tuple[Tensor, Rows]:
    """One image's part of a decision; raises `DecisionError` naming `where` if it does not fit.

    `columns` are those of the stage that decided, of all that rows carry.
    """
    if answer.rows is not None:
        if answer.places is None or answer.keep is not None:
            raise DecisionError(f"{where}: `encode` returned rows; they go with `places`, and not with `keep`")
        features, rows = answer.rows[image], _rewritten(answer, image, rows, where)
    elif answer.keep is not None:
        keep = _fits(answer.keep[image], rows, image, where) | rows.protected
        features = features[keep]
        places, protected, sizes = rows.places[keep], rows.protected[keep], rows.sizes[keep]
        rows = replace(rows, places=places, protected=protected, sizes=sizes, carried=rows.carried[keep])
    if answer.protect is not None:
        rows = replace(rows, protected=rows.protected | _fits(answer.protect[image], rows, image, where))
    if answer.carry is not None:
        rows = replace(rows, carried=_loaded(answer.carry[image], rows, image, where, columns))
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
    own = torch.searchsorted(rows.places, places.contiguous())
    return Rows(places, rows.protected[own], sizes, rows.carried[own], rows.rewritten + 1, answer.proportional)


def _loaded(carry: Tensor, rows: Rows, image: int, where: str, columns: slice) -> Float[Tensor, "rows carries"]:
    expected = (len(rows.places), columns.stop - columns.start)
    if not carry.is_floating_point() or tuple(carry.shape) != expected:
        raise DecisionError(
            f"{where}: `encode` returned {carry.dtype} {tuple(carry.shape)} to carry for image {image}, expected a "
            f"float dtype and {expected}, the rows that stay and what the stage's `carries` says"
        )
    carried = rows.carried.clone()
    carried[:, columns] = carry.detach().to(carried)
    return carried


def _fits(mask: Tensor, rows: Rows, image: int, where: str) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != rows.places.shape:
        raise DecisionError(
            f"{where}: `encode` returned a mask of {mask.dtype} {tuple(mask.shape)} for image {image}, "
            f"expected torch.bool {tuple(rows.places.shape)}"
        )
    return mask

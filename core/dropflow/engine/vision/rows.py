"""The patch rows of an image on the vision side of a call, and how a stage's decision changes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.engine.tokens.host import read
from dropflow.errors import DecisionError
from dropflow.lifecycle.payloads import Encode


@dataclass(frozen=True, eq=False)
class Rows:
    """The patch rows of one image that remain at some point of the encoder."""

    places: Int[Tensor, "rows"]
    """Number, within the image, of the patch that each row represents."""
    protected: Bool[Tensor, "rows"]
    sizes: Float[Tensor, "rows"]
    """Number of patches averaged in each row."""
    carried: Float[Tensor, "rows carries"]
    """Numbers that stages attached to each row for the LLM side, in the columns given by `Plan.carries`."""
    rewritten: int = 0
    """How often a stage has replaced rows by new ones, such as merged ones."""
    proportional: bool = False
    """Whether the encoder's attention weights each row by its size."""

    @classmethod
    def whole(cls, count: int, like: Tensor, carries: int = 0) -> Rows:
        """All patches of an image, unprotected and carrying zeros, on the device of `like`."""
        places, device = torch.arange(count, device=like.device), like.device
        carried = torch.zeros(count, carries, device=device)
        return cls(places, torch.zeros_like(places).bool(), torch.ones(count, device=device), carried)

    def to(self, device: torch.device) -> Rows:
        """The same on `device`, since an encoder's layers and its projector may be on different devices."""
        places, protected = self.places.to(device), self.protected.to(device)
        return replace(
            self, places=places, protected=protected, sizes=self.sizes.to(device), carried=self.carried.to(device)
        )

    def after(self, extra: int) -> Rows:
        """The rows after `extra` prefix tokens that also reach the LLM and fill the first placeholders."""
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

    def taken(self, index: Int[Tensor, "left"]) -> Rows:
        """Only the rows with the numbers in `index`."""
        return replace(
            self,
            places=self.places[index],
            protected=self.protected[index],
            sizes=self.sizes[index],
            carried=self.carried[index],
        )


class Decided:
    """The effect of one stage's decision on the images of a call."""

    def __init__(self, answer: Encode, where: str, columns: slice) -> None:
        """`where` names the stage in errors; `columns` are the stage's own among the carried numbers."""
        self._answer, self._where, self._columns = answer, where, columns
        self.faults: list[tuple[Bool[Tensor, ""], DecisionError]] = []
        """Pairs of a condition on the device and the error to raise if it is true."""

    def apply(
        self, features: Sequence[Float[Tensor, "rows dim"]], rows: Sequence[Rows]
    ) -> tuple[list[Float[Tensor, "left dim"]], list[Rows]]:
        """Features and rows of every image after the decision; at most one host synchronisation for all of them.

        Raises `DecisionError` for a decision of the wrong shape or dtype.
        """
        answer = self._answer
        left, features = list(rows), list(features)
        self._check_entries(len(left))
        if answer.rows is not None:
            if answer.places is None or answer.keep is not None:
                raise DecisionError(
                    f"{self._where}: `encode` returned rows without `places`, or together with `keep`; return `places` "
                    "with them, and no `keep`"
                )
            features = list(answer.rows)
            left = [self._rewritten(image, own) for image, own in enumerate(left)]
        elif answer.keep is not None:
            masks = [
                self._fits(mask, image, left[image]) | left[image].protected for image, mask in enumerate(answer.keep)
            ]
            for image, index in enumerate(_indices(masks)):
                features[image], left[image] = features[image][index], left[image].taken(index)
        for image, own in enumerate(left):
            if answer.protect is not None:
                own = replace(own, protected=own.protected | self._fits(answer.protect[image], image, own))
            if answer.carry is not None:
                own = replace(own, carried=self._loaded(answer.carry[image], image, own))
            left[image] = own
        return features, left

    def _check_entries(self, images: int) -> None:
        """Check that whatever the decision says about images, it says it about each of them."""
        for name in ("keep", "rows", "places", "sizes", "protect", "carry"):
            given = getattr(self._answer, name)
            entries = list(given) if isinstance(given, Sequence) or (isinstance(given, Tensor) and given.dim()) else []
            if given is not None and (len(entries) != images or not all(isinstance(own, Tensor) for own in entries)):
                raise DecisionError(
                    f"{self._where}: `encode` returned `{name}` of length {len(entries)}, expected a tensor for each "
                    f"of the {images} images"
                )

    def _rewritten(self, image: int, rows: Rows) -> Rows:
        answer = self._answer
        assert answer.rows is not None
        assert answer.places is not None
        features, places = answer.rows[image], answer.places[image].contiguous()
        sizes = torch.ones(len(places), device=places.device) if answer.sizes is None else answer.sizes[image]
        wrong = DecisionError(
            f"{self._where}: `encode` returned {len(features)} rows, places {tuple(places.shape)} and sizes "
            f"{tuple(sizes.shape)} for image {image}; expected one place and one size per row, the places ascending "
            "and taken from the payload's places"
        )
        if len(features) != len(places) or len(sizes) != len(places) or (len(places) and not len(rows.places)):
            raise wrong
        if not len(places):
            return Rows(places, rows.protected[:0], sizes, rows.carried[:0], rows.rewritten + 1, answer.proportional)
        own = torch.searchsorted(rows.places, places).clamp(max=len(rows.places) - 1)
        fits = (rows.places[own] == places).all() & (places.diff() > 0).all()
        self.faults.append((~fits, wrong))
        return Rows(places, rows.protected[own], sizes, rows.carried[own], rows.rewritten + 1, answer.proportional)

    def _loaded(self, carry: Tensor, image: int, rows: Rows) -> Float[Tensor, "rows carries"]:
        expected = (len(rows.places), self._columns.stop - self._columns.start)
        if not carry.is_floating_point() or tuple(carry.shape) != expected:
            raise DecisionError(
                f"{self._where}: `encode` returned {carry.dtype} {tuple(carry.shape)} to carry for image {image}, "
                f"expected a float dtype and {expected}: the rows that stay and the stage's `carries`"
            )
        carried = rows.carried.clone()
        carried[:, self._columns] = carry.detach().to(carried)
        return carried

    def _fits(self, mask: Tensor, image: int, rows: Rows) -> Tensor:
        if mask.dtype != torch.bool or mask.shape != rows.places.shape:
            raise DecisionError(
                f"{self._where}: `encode` returned a mask of {mask.dtype} {tuple(mask.shape)} for image {image}, "
                f"expected torch.bool {tuple(rows.places.shape)}"
            )
        return mask


def raise_faults(faults: Sequence[tuple[Bool[Tensor, ""], DecisionError]]) -> None:
    """Raise the first error whose condition is true; one host synchronisation if there are any faults."""
    if faults:
        (wrong,) = read(torch.stack([fault for fault, _ in faults]))
        for held, (_, error) in zip(wrong, faults, strict=True):
            if held:
                raise error


def _indices(masks: Sequence[Bool[Tensor, "rows"]]) -> list[Int[Tensor, "left"]]:
    """The indices where each mask is true; one host synchronisation for all masks."""
    if not masks:
        return []
    (counts,) = read(torch.stack([mask.sum() for mask in masks]))
    # a stable sort of booleans puts the rows that stay first, in order
    return [
        torch.argsort((~mask).to(torch.uint8), stable=True)[:count] for mask, count in zip(masks, counts, strict=True)
    ]

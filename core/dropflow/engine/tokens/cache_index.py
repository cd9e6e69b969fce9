"""Which logical token each entry of a layer's KV cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.engine.tokens.live_set import LiveSet
from dropflow.lifecycle.lazy import lazy

PADDING = -2
"""Image number of entries that hold padding."""
AHEAD = 256
"""Number of future tokens for which mask columns are computed in advance."""
PROTECTED = 1 << 40
"""Added to the image number of entries that no stage may drop."""


class KeyIndex:
    """The tokens that the first entries of a layer's cache hold; immutable, and shared by consecutive layers.

    Entries appended later (generated tokens) are implicit: entry `len(self) + j` holds logical token `length + j`, so
    decoding does not change the index.
    """

    def __init__(
        self,
        logical: Int[Tensor, "batch entries"],
        valid: Bool[Tensor, "batch entries"] | None,
        image: Int[Tensor, "batch entries"],
        length: int,
        dropped: Int[Tensor, "batch"] | None = None,
        images: int = 0,
    ) -> None:
        self.logical = logical
        """Logical index of the token in each entry."""
        self.valid = valid
        """False for padding entries; `None` if there are none."""
        self.image_id = image
        """Image number of visual tokens, plus `PROTECTED` if they are protected; -1 for text, `PADDING` for padding.

        The numbering continues from call to call.
        """
        self.length = length
        """Number of logical tokens seen when the explicit entries were written."""
        self.dropped = dropped
        """Number of tokens of each sample, excluding padding, that are missing here; `None` for none."""
        self.images = images
        """Upper bound (exclusive) of the image numbers."""
        self._last: tuple[Any, KeyIndex] | None = None
        self._ahead: tuple[int, Tensor, Tensor | None] | None = None
        self._places: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def plain(
        cls, batch: int, length: int, device: torch.device, real: Bool[Tensor, "batch tokens"] | None = None
    ) -> KeyIndex:
        """A cache of `length` text tokens from which nothing was dropped; `real` is false for padding."""
        logical = torch.arange(length, device=device).expand(batch, -1)
        return cls(logical, None, _text(logical, real), length)

    def __len__(self) -> int:
        return self.logical.shape[1]

    @lazy
    def complete(self) -> bool:
        """Whether every logical token is held, in order, so that the model's own mask fits as it is."""
        return self.valid is None and len(self) == self.length

    @property
    def ahead(self) -> bool:
        """Whether the entries hold tokens of a call that is still to come (see `Ahead`)."""
        return not self.length and len(self) > 0

    def upto(self, length: int, real: Bool[Tensor, "batch tokens"] | None = None) -> KeyIndex:
        """The same with implicit entries up to `length` logical tokens made explicit.

        `real` is false for padding among the last tokens.
        """
        if length == self.length:
            return self
        batch, device = self.logical.shape[0], self.logical.device
        more = torch.arange(self.length, length, device=device).expand(batch, -1)
        valid = None if self.valid is None else torch.cat((self.valid, torch.ones_like(more, dtype=torch.bool)), 1)
        image = torch.cat((self.image_id, _text(more, real)), 1)
        return KeyIndex(torch.cat((self.logical, more), 1), valid, image, length, self.dropped, self.images)

    def first(self, length: int) -> KeyIndex:
        """The same without the tokens from `length` on, of an index from which no token is missing."""
        valid = None if self.valid is None else self.valid[:, :length]
        return KeyIndex(self.logical[:, :length], valid, self.image_id[:, :length], length, images=self.images)

    @property
    def filled(self) -> Bool[Tensor, "batch entries"]:
        """False for padding entries; never `None`."""
        return torch.ones_like(self.logical, dtype=torch.bool) if self.valid is None else self.valid

    def entries_of(self, tokens: Int[Tensor, "batch tokens"], most: int) -> Int[Tensor, "batch tokens"]:
        """The entry that holds each of some tokens, given by logical index, all below `most`; 0 for those not held."""
        batch, entries = self.logical.shape
        token = torch.where(self.filled, self.logical, most)  # a place that nobody reads
        entry = torch.zeros(batch, most + 1, dtype=torch.long, device=token.device)
        entry.scatter_(1, token, torch.arange(entries, device=token.device).expand(batch, -1))
        return entry.gather(1, tokens.to(token.device))

    def columns(self, length: int) -> tuple[Int[Tensor, "batch 1 1 entries"], Bool[Tensor, "batch 1 1 entries"] | None]:
        """Mask columns of the entries up to `length` logical tokens, and their validity (false for padding).

        Computed for many tokens in advance, so that each decode step slices the same tensors.
        """
        more = length - self.length
        if self._ahead is None or self._ahead[0] < more:
            room = more + AHEAD
            far = self.upto(self.length + room)
            valid = None if far.valid is None else far.valid[:, None, None]
            self._ahead = room, far.logical[:, None, None], valid
        _, logical, valid = self._ahead
        entries = len(self) + more
        return logical.narrow(3, 0, entries), None if valid is None else valid.narrow(3, 0, entries)

    def places(
        self, limit: int, capacity: int
    ) -> tuple[Int[Tensor, "batch 1 1 capacity"], Bool[Tensor, "batch 1 1 capacity"]]:
        """Mask columns of the entries of a layer with room for `capacity`, and whether they can ever be seen.

        Of a mask with `limit` columns; padding and entries beyond the limit cannot, and have some column. Layers that
        share this index share the result.
        """
        if self._places is None or self._places[0] != (limit, capacity):
            far = self.upto(self.length + capacity - len(self))
            columns, shown = far.logical.clamp(max=limit - 1), far.filled & (far.logical < limit)
            self._places = (limit, capacity), (columns[:, None, None].contiguous(), shown[:, None, None].contiguous())
        return self._places[1]

    def followed_by(
        self,
        live: LiveSet,
        image: Int[Tensor, "batch tokens"],
        dropped: Int[Tensor, "batch"] | None = None,
        images: int = 0,
    ) -> KeyIndex:
        """The same with the live tokens of another call appended; call `upto` first.

        `dropped` counts the call's other tokens, `image` numbers its `images` from 0.
        """
        logical = torch.cat((self.logical, self.length + live.index), 1)
        valid = None
        if self.valid is not None or live.valid is not None:
            valid = torch.cat((self.filled, live.filled), 1)
        image = torch.where(image >= 0, image + self.images, image) if self.images else image
        slots = live.take(image) if live.valid is None else torch.where(live.valid, live.take(image), -1)
        image = torch.cat((self.image_id, slots), 1)
        length, images = self.length + live.total, self.images + images
        return KeyIndex(logical, valid, image, length, _sum(self.dropped, dropped), images)

    def rows(self, key: Any, rows: Callable[[], Tensor]) -> KeyIndex:
        """The samples selected by `rows()`; layers that share this index and pass the same `key` share the result."""
        if self._last is None or self._last[0] is not key:
            picked = rows().to(self.logical.device)
            valid = None if self.valid is None else self.valid[picked]
            dropped = None if self.dropped is None else self.dropped[picked]
            index = KeyIndex(self.logical[picked], valid, self.image_id[picked], self.length, dropped, self.images)
            self._last = (key, index)
        return self._last[1]

    def compacted(self, kept: LiveSet) -> KeyIndex:
        """Only the entries in the slots of `kept`, a live set over entries."""
        valid = kept.valid
        if self.valid is not None:
            taken = kept.take(self.valid)
            valid = taken if valid is None else valid & taken
        index = KeyIndex(kept.take(self.logical), valid, kept.take(self.image_id), self.length, images=self.images)
        index.dropped = _sum(self.dropped, self.tokens - index.tokens)
        return index

    def narrowed(self, seen: Bool[Tensor, "batch last"]) -> KeyIndex:
        """The same entries for a layer that sees, of the last ones, only those where `seen` is true."""
        seen = torch.nn.functional.pad(seen, (len(self) - seen.shape[1], 0), value=True).to(self.logical.device)
        valid = seen if self.valid is None else self.valid & seen
        return KeyIndex(self.logical, valid, self.image_id, self.length, self.dropped, self.images)

    @lazy
    def tokens(self) -> Int[Tensor, "batch"]:
        """Number of tokens held for each sample, excluding padding."""
        return self._count(self.image_id != PADDING)

    @lazy
    def visual(self) -> Int[Tensor, "batch"]:
        """Number of visual tokens held for each sample."""
        return self._count(self.image_id >= 0)

    def without_last(self, count: int) -> KeyIndex:
        """The same without the last `count` entries, which must be the last `count` logical tokens and all be text.

        Raises `ValueError` otherwise: a dropped or visual token cannot be taken back.
        """
        tail = slice(len(self) - count, None)
        expected = torch.arange(self.length - count, self.length, device=self.logical.device)
        if count > len(self) or not bool(((self.logical[:, tail] == expected) & (self.image_id[:, tail] < 0)).all()):
            raise ValueError("only text at the end of the cache can be cropped, neither visual tokens nor padding")
        head = slice(0, len(self) - count)
        valid = None if self.valid is None else self.valid[:, head]
        length = self.length - count
        return KeyIndex(self.logical[:, head], valid, self.image_id[:, head], length, self.dropped, self.images)

    def _count(self, entries: Bool[Tensor, "batch entries"]) -> Int[Tensor, "batch"]:
        return (entries if self.valid is None else entries & self.valid).sum(1)


def _text(tokens: Int[Tensor, "batch tokens"], real: Tensor | None) -> Tensor:
    """Image numbers of text tokens, and of padding among the last ones where `real` is false."""
    image = torch.full_like(tokens, -1)
    if real is None:
        return image
    padding = torch.nn.functional.pad(~real, (tokens.shape[1] - real.shape[1], 0)).to(image.device)
    return image.masked_fill(padding, PADDING)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second

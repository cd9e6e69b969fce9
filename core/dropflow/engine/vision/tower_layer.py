"""What the attention of one layer of a vision tower says about its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dropflow.engine.model.attention import QueryKey, row_attention


@dataclass(frozen=True, eq=False)
class TowerLayer:
    """q and k of one layer, from one or more computations of attention.

    Rows are numbered through all parts, sample by sample, prefix rows and padding included.
    """

    parts: tuple[QueryKey, ...]
    """Rows that attend to each other: a batch of pictures, or one segment of a packed sequence (batch 1) each."""
    counts: tuple[int, ...]
    """Rows of each picture that are neither prefix nor padding."""
    prefix: int = 0
    """Rows of each picture before its patches; 0 in a packed sequence."""
    packed: bool = False
    """Whether the parts are segments of one sequence: whole pictures, or windows of them."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.key.shape[0] * part.key.shape[2] for part in self.parts)

    def attention(self, rows: Int[Tensor, "images rows"]) -> Float[Tensor, "images heads rows keys"]:
        """Attention of a few rows of each picture of a batch."""
        return row_attention(self.parts[0], rows)

    def cls(self, *, joined: bool) -> Float[Tensor, "rows"]:
        """Attention from the first row of each picture, averaged over heads; see `EncodeCall.cls_attention`."""
        found = []
        for part in self._joined() if joined else self.parts:
            first = torch.zeros(part.key.shape[0], 1, dtype=torch.long, device=part.key.device)
            found.append(row_attention(part, first).mean(1)[:, 0].flatten())
        return torch.cat(found)

    def received(self) -> Float[Tensor, "rows"]:
        """Attention that each row gets from the patches of its picture, averaged over heads.

        The sum is divided by the patches of the picture, in layers with windows too, so that layers compare.
        """
        if not self.packed:
            (part,) = self.parts
            sums = _column_sums(part, self.prefix, self.counts)
            divisor = torch.tensor(self.counts, device=sums.device).clamp(min=1)
            return (sums / divisor[:, None].to(sums.dtype)).flatten()
        sums = torch.cat([_column_sums(part, 0, [part.key.shape[2]])[0] for part in self.parts])
        counts = torch.tensor(self.counts, device=sums.device)
        return sums / counts.repeat_interleave(counts, output_size=len(sums)).to(sums.dtype)

    def keys(self, *, joined: bool) -> Float[Tensor, "rows dim"]:
        """Keys, averaged over heads or with the heads side by side."""
        parts = self._joined() if joined else [part.whole() for part in self.parts]
        return torch.cat([part.key.mean(1).flatten(0, 1) for part in parts])

    def _joined(self) -> list[QueryKey]:
        """The parts as if the layer had one head of its whole width, in float32."""
        found = []
        for part in (part.whole() for part in self.parts):
            key = part.key.repeat_interleave(part.query.shape[1] // part.key.shape[1], 1)
            query, key = (own.transpose(1, 2).flatten(2)[:, None].float() for own in (part.query, key))
            found.append(replace(part, query=query, key=key, scaling=query.shape[-1] ** -0.5))
        return found


def segments(calls: Sequence[QueryKey], pictures: Sequence[int]) -> tuple[QueryKey, ...]:
    """The computations of attention over a packed sequence, cut so that rows attend only to rows of their own part.

    A layer may be called once for each segment, or once with borders for its kernel, or once with a mask that keeps
    the rows of different `pictures` apart.
    """
    if len(calls) != 1:
        return tuple(calls)
    (call,) = calls
    lengths = list(pictures) if call.borders is None else call.borders.diff().tolist()
    if len(lengths) < 2:
        return (replace(call, borders=None),)
    cut = zip(torch.split(call.query, lengths, 2), torch.split(call.key, lengths, 2), strict=True)
    return tuple(replace(call, query=query, key=key, mask=None, borders=None) for query, key in cut)


def _column_sums(part: QueryKey, prefix: int, counts: Sequence[int]) -> Float[Tensor, "batch keys"]:
    """Sums of the attention map over the first `counts` rows after the prefix, in slices much smaller than the map."""
    longest, keys = max(counts, default=0), part.key.shape[2]
    asks = torch.arange(prefix, prefix + longest, device=part.key.device).expand(len(part.key), -1)
    real = asks < prefix + torch.tensor(list(counts), device=part.key.device)[:, None]
    total = torch.zeros(len(part.key), keys, dtype=part.query.dtype, device=part.key.device)
    stop, step = 0, 1
    while stop < longest:  # the first slice is one row, which gives the number of heads
        start, stop = stop, stop + step
        weights = row_attention(part, asks[:, start:stop].clamp(max=keys - 1))
        step = max(1, longest // (4 * weights.shape[1]))
        total = total + (weights.mean(1) * real[:, start:stop, None]).sum(1)
    return total

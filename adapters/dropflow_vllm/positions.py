"""Persistent positions in vLLM: survivors of an image keep the positions that they have in the whole prompt.

vLLM sizes placeholders before the vision tower runs, and knows only afterwards which rows stay. So the text after an
image is numbered as if the whole image were there, and the rows bring where they lie in it, as extra columns of their
embeddings, which vLLM's hook for pruned videos splits off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BASE = 128
"""A number is written as two digits of this base, which every float type holds exactly."""
LARGEST = BASE * BASE - 1
NUMBERS = 4
"""Time, row and column of a row in its image, and its number among the rows that stay."""
COLUMNS = 2 * NUMBERS


@dataclass(frozen=True)
class Span:
    """The placeholders of one image in a prompt."""

    offset: int
    """Index of the first one."""
    length: int
    """Number of placeholders."""
    advance: int
    """Positions that the image takes up in the whole prompt."""


def marked(
    rows: Float[Tensor, "rows dim"], places: Int[Tensor, "rows"], columns: int | None
) -> Float[Tensor, "rows marked"]:
    """Rows with the columns that say where they lie in their image; `columns` of its grid, `None` to count rows alone.

    Raises `ValueError` for an image of more rows than two digits can number.
    """
    if columns is None:
        lies = (places, places, places)
    else:
        lies = (torch.zeros_like(places), places // columns, places % columns)
    numbers = torch.stack((*lies, torch.arange(len(places), device=places.device)), 1)
    if len(places) and max(int(places[-1]), len(places)) > LARGEST:
        raise ValueError(f"an image of more than {LARGEST + 1} patches has no persistent positions in vLLM")
    digits = torch.stack((numbers // BASE, numbers % BASE), 2).flatten(1)
    return torch.cat((rows, digits.to(rows)), 1)


def unmarked(rows: Float[Tensor, "rows marked"]) -> tuple[Float[Tensor, "rows dim"], Int[Tensor, "numbers rows"]]:
    """The rows without these columns, and the four numbers of each."""
    digits = rows[:, -COLUMNS:].long().view(len(rows), NUMBERS, 2)
    return rows[:, :-COLUMNS], (digits[:, :, 0] * BASE + digits[:, :, 1]).T


def first_positions(length: int, spans: Sequence[Span]) -> tuple[Int[Tensor, "3 tokens"], int]:
    """Positions of a prompt of `length` tokens before any image is encoded, and what to add to an index after it.

    Text is numbered as in the whole prompt; placeholders stand at the start of their image until their rows say more.
    """
    found, index, position = torch.zeros(length, dtype=torch.long), 0, 0
    for span in sorted(spans, key=lambda span: span.offset):
        text = span.offset - index
        found[index : span.offset] = torch.arange(position, position + text)
        position += text
        found[span.offset : span.offset + span.length] = position
        index, position = span.offset + span.length, position + span.advance
    found[index:] = torch.arange(position, position + length - index)
    return found.expand(3, -1).contiguous(), position - index


def with_rows(
    positions: Int[Tensor, "3 tokens"],
    placeholders: Int[Tensor, "tokens"],
    numbers: Sequence[Int[Tensor, "numbers rows"]],
    computed: int,
) -> tuple[Int[Tensor, "3 tokens"], int]:
    """The positions once rows are known, and what to add to an index after the prompt.

    `placeholders` is true at placeholders; `numbers` are those of the rows for the first of them from the index
    `computed` on. An image starts where its first row lies, right after text (`check_spans`).
    """
    if numbers:
        found = torch.cat(list(numbers), 1).to(positions.device)
        index = placeholders.to(positions.device).nonzero()[:, 0]
        index = index[index >= computed][: found.shape[1]]
        start = index - found[3]
        before = positions[0, (start - 1).clamp(min=0)] + 1
        positions = positions.index_copy(1, index, torch.where(start > 0, before, 0) + found[:3])
    return positions, int(positions[0, -1]) + 1 - positions.shape[1]


def check_spans(length: int, spans: Sequence[Span], longest: int, table: int) -> None:
    """Refuse a prompt whose positions cannot be told, or would leave the table of rotary embeddings.

    `longest` is vLLM's `max_model_len`, `table` the number of positions that the model can rotate by. Raises
    `ValueError`, which a server answers as a bad request.
    """
    ordered = sorted(spans, key=lambda span: span.offset)
    starts = [*(span.offset for span in ordered[1:]), length]
    for span, start in zip(ordered, starts, strict=True):
        if span.offset + span.length == start:
            raise ValueError(
                "an image is followed by no text, but under `positions: persistent` text has to follow every image; "
                "put text between images and after the last one, or write `positions: compact` where the model can"
            )
    removed = sum(span.advance - span.length for span in ordered)
    if removed + longest > table:
        raise ValueError(
            f"{removed} positions of this prompt's images have no token, so that an answer of full length would end at "
            f"position {removed + longest}, but the model can rotate by {table}; send fewer images, or lower "
            "max_model_len"
        )

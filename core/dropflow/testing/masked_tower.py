"""An oracle for packed vision towers: the full run in which the rows of units that were left out are masked as keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dropflow.engine.model.shadowing import Shadows

Marks = list[list[Tensor]]
"""For each block, and for each segment in the order in which the block attends: which of its rows are gone (rows)."""


def masked_features(
    encode: Callable[[Tensor], Any],
    pixels: Float[Tensor, "rows width"],
    gone: Mapping[int, Bool[Tensor, "rows"]],
    implementation: str,
) -> Any:
    """`encode(pixels)` by the full tower, in which rows that are gone before a block are no keys from that block on.

    `encode` runs the tower; `gone` maps a block to the rows, in the order of the pixels, that are gone from it on;
    `implementation` is the tower's attention. The oracle knows neither segments nor the order in which blocks see rows:
    a first run finds them by rows of NaN. Rows that are gone have undefined features.
    """
    found: dict[int, Marks] = {}
    for block, rows in gone.items():
        found[block] = []
        with torch.no_grad(), _attending(implementation, _Finder(found[block])):
            encode(pixels.masked_fill(rows.to(pixels.device)[:, None], torch.nan))
    with _attending(implementation, _Masker(found)):
        return encode(pixels)


@contextmanager
def _attending(implementation: str, attend: _Attention) -> Iterator[None]:
    with Shadows().over(vars(ALL_ATTENTION_FUNCTIONS)["_local_mapping"], implementation, attend):
        yield


class _Attention:
    """Attention with some keys masked; every row still sees itself."""

    def __init__(self) -> None:
        self._blocks: list[Any] = []
        self._segments: dict[int, int] = {}

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        assert attention_mask is None, "expected a tower that attends segment by segment, without a mask"
        if module not in self._blocks:
            self._blocks.append(module)
        block = self._blocks.index(module)
        segment = self._segments[block] = self._segments.get(block, -1) + 1
        gone = self.gone(block, segment, key)
        key, value = (part.masked_fill(gone[:, None], 0.0) if part.isnan().any() else part for part in (key, value))
        scores = (query @ key.transpose(-1, -2)).float() * scaling
        own = torch.eye(len(gone), dtype=torch.bool, device=gone.device)
        weights = scores.masked_fill(gone[None] & ~own, -torch.inf).softmax(-1).to(query.dtype)
        return (weights @ value).transpose(1, 2), None

    def gone(self, block: int, segment: int, key: Float[Tensor, "1 heads rows dim"]) -> Bool[Tensor, "rows"]:
        """Which rows of a segment are no keys in a block."""
        raise NotImplementedError


class _Finder(_Attention):
    """Takes down where rows of NaN are."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self._marks = marks

    def gone(self, block: int, segment: int, key: Tensor) -> Tensor:  # noqa: ARG002  # segments come in order
        if block == len(self._marks):
            self._marks.append([])
        self._marks[block].append(key.isnan().any(-1).any(1)[0])
        return self._marks[block][-1]


class _Masker(_Attention):
    """Masks what was taken down, from the block on before which it is gone."""

    def __init__(self, found: Mapping[int, Marks]) -> None:
        super().__init__()
        self._found = found

    def gone(self, block: int, segment: int, key: Tensor) -> Tensor:
        gone = torch.zeros(key.shape[2], dtype=torch.bool, device=key.device)
        for first, marks in self._found.items():
            if first <= block:
                gone |= marks[block][segment]
        return gone

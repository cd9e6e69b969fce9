"""Checks of what stages ask `attention_rows` for."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dropflow.errors import DecisionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def check_layer(layer: Any) -> None:
    """Raise `DecisionError` unless `layer` is a whole number."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise DecisionError(f"expected the number of a layer, got {layer!r}")


@contextmanager
def asked_rows(layer: Any, rows: Any, samples: int, tokens: int, axes: str) -> Iterator[Tensor]:
    """Give `rows`, numbers below `tokens` of shape (samples, rows), as int64; `axes` is how errors call the shape.

    Raises `DecisionError` for a layer that is no whole number and for rows of another type or shape. Their range is
    read only after torch has failed inside the block, since to read it makes the host wait; on a GPU torch's own
    assertion is all there is.
    """
    import torch

    check_layer(layer)
    asked = f"attention_rows of layer {layer}"
    if not isinstance(rows, torch.Tensor):
        raise DecisionError(f"{asked}: expected rows as an integer tensor {axes}, got {type(rows).__name__}")
    if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
        raise DecisionError(
            f"{asked}: expected rows as an integer tensor {axes}, got {rows.dtype}; `mask.nonzero()` and `topk` give "
            "numbers of rows"
        )
    if rows.dim() != 2 or len(rows) != samples or not rows.shape[1]:
        raise DecisionError(
            f"{asked}: expected rows {axes}, {samples} x one or more, got the shape {tuple(rows.shape)}"
        )
    try:
        yield rows.long()
    except (IndexError, RuntimeError):
        if rows.device.type == "cpu":
            low, high = (int(end) for end in rows.aminmax())
            if low < 0 or high >= tokens:
                wrong = low if low < 0 else high
                raise DecisionError(f"{asked}: expected rows from 0 to {tokens - 1}, got {wrong}") from None
        raise

"""Settings of the measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    top: float = 0.1
    """K of ILVAS, as a share of a sample's visual tokens."""
    batch_size: int = 32
    max_new_tokens: int = 32


def distances(layers: int) -> tuple[int, ...]:
    """Return the distances n of ILVAS: an eighth and a quarter of the depth, as HiDrop's 4 and 8 of 32 layers."""
    return tuple(sorted({max(1, (layers + 4) // 8), max(1, (layers + 2) // 4)}))

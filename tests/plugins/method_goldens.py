"""What the published code of the vision-side methods computed, on small random tensors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import settings

FEW = settings(deadline=None, max_examples=25, derandomize=True)
"""For properties of pure functions."""
DATA = Path(__file__).parents[1] / "data" / "methods"


@functools.cache
def recorded(name: str) -> dict[str, dict[str, Any]]:
    """Case -> its arrays by name, as tensors, scalars as Python numbers; case "" holds what belongs to none."""
    found: dict[str, dict[str, Any]] = {}
    with np.load(DATA / f"{name}.npz") as arrays:
        for key in arrays.files:
            case, _, rest = key.rpartition("/")
            array = arrays[key]
            found.setdefault(case, {})[rest] = array.item() if array.ndim == 0 else torch.from_numpy(array)
    return found

"""What the published code of the methods of 2025 and 2026 computed, and payloads that show it to a stage."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropflow import EncodeBoundary, EncodeCall
from dropflow.engine.model.attention import QueryKey
from dropflow.engine.vision.tower_layer import TowerLayer

DATA = Path(__file__).parents[1] / "data" / "methods-2026"


@functools.cache
def golden(name: str) -> dict[str, Any]:
    """The arrays of one recorded file as tensors, and its `meta`."""
    with np.load(DATA / f"{name}.npz") as arrays:
        found: dict[str, Any] = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
        return found | {"meta": json.loads(str(arrays["meta"]))}


def layer_of_cls_rows(rows: Tensor) -> TowerLayer:
    """A vision layer whose CLS row attends as in `rows` (images, heads, 1 + patches), which sum to 1."""
    key = rows.double().log()[..., None]
    seen = QueryKey(torch.ones_like(key), key, None, scaling=1.0, causal=False)
    return TowerLayer((seen,), (rows.shape[2] - 1,) * len(rows), prefix=1)


def encode_call(
    features: Sequence[Tensor], layer: TowerLayer, boundary: EncodeBoundary = "features", prefix: int = 1
) -> EncodeCall:
    """A payload of whole images whose rows are those of a tower with `prefix` rows before each, CLS if there is one."""
    starts = [sum(len(one) + prefix for one in features[:image]) + prefix for image in range(len(features))]
    members = [torch.arange(len(one))[:, None] + start for one, start in zip(features, starts, strict=True)]
    return EncodeCall(
        boundary=boundary,
        features=tuple(features),
        prefix_rows=torch.zeros(len(features), prefix, features[0].shape[1]),
        places=tuple(torch.arange(len(one)) for one in features),
        sizes=tuple(torch.ones(len(one)) for one in features),
        grids=(None,) * len(features),
        prefix=prefix,
        has_cls=prefix > 0,
        tower=lambda _: layer,
        members=lambda _: tuple(members),
    )

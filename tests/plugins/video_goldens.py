"""What the published code of the video methods computed, on small random tensors, and payloads that show it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropflow import Encode, EncodeCall, Stage

DATA = Path(__file__).parents[1] / "data" / "video"


@functools.cache
def golden(name: str) -> dict[str, Any]:
    """The arrays of one recorded file as tensors, scalars as Python numbers, and its `params`, if any, as a mapping."""
    with np.load(DATA / f"{name}.npz") as arrays:
        found = {k: v.item() if v.ndim == 0 else torch.from_numpy(v) for k, v in arrays.items()}
    return found | ({"params": json.loads(found["params"])} if "params" in found else {})


def goldens(kind: str) -> list[str]:
    """Names of the recorded files whose name is `kind` and a number."""
    return sorted(path.stem for path in DATA.glob(f"{kind}_[0-9]*.npz"))


def encode_call(*videos: Tensor, attention: tuple[Tensor, ...] | None = None, **more: Any) -> EncodeCall:
    """Projected frames of `videos`, (frames, rows, dim) each, and the attention (frames, rows) they received."""
    features = tuple(frame for video in videos for frame in video)
    first, groups = 0, []
    for video in videos:
        groups.append(tuple(range(first, first + len(video))))
        first += len(video)
    starts = np.cumsum([0, *map(len, features)])
    members = tuple(
        torch.arange(len(rows))[:, None] + int(start) for rows, start in zip(features, starts, strict=False)
    )
    received = torch.zeros(int(starts[-1])) if attention is None else torch.cat([own.flatten() for own in attention])
    given: dict[str, Any] = {
        "boundary": None,
        "features": features,
        "prefix_rows": torch.zeros(len(features), 0, features[0].shape[1]),
        "places": tuple(torch.arange(len(rows)) for rows in features),
        "sizes": tuple(torch.ones(len(rows)) for rows in features),
        "grids": (None,) * len(features),
        "prefix": 0,
        "has_cls": False,
        "tower": lambda _: SimpleNamespace(received=lambda: received),
        "members": lambda _: members,
        "videos": tuple(groups),
        "separate": False,
    }
    return EncodeCall(**(given | more))


def kept(stage: Stage[Any], *videos: Tensor) -> list[Tensor]:
    """Global indices (frame after frame) of the tokens that a stage keeps of each of the videos, all in one call."""
    answer: Encode = stage.encode(encode_call(*videos))  # type: ignore[attr-defined]
    assert answer.keep is not None
    masks, found = list(answer.keep), []
    for video in videos:
        found.append(torch.cat(masks[: len(video)]).nonzero()[:, 0])
        del masks[: len(video)]
    return found

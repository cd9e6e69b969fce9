"""Questions about one image: the prompt a prefix is made from, those that begin with it, and policies to ask under."""

from __future__ import annotations

from typing import Any

import torch
from tiny import HIDROP, KEEP_ALL, PAD, policy, prompt

POLICIES = {
    "keeps everything": KEEP_ALL,
    "hidrop": HIDROP,
    "encode": policy(few={"use": "divprune/max-min", "keep": 5}),
    "fastv": policy(rank={"use": "fastv/attention-rank", "at": 2, "keep": 6}),
    "pyramiddrop": policy(pyramid={"use": "pyramiddrop/pyramid", "keep": {2: 8, 4: 3}}),
    "mustdrop": policy(
        merge={"use": "mustdrop/spatial-merge", "at": 1, "window": [2, 2], "threshold": 0.5},
        keys={"use": "mustdrop/key-set", "share": 0.1},
        filter={"use": "mustdrop/dual-attention", "at": [2, 4], "global_threshold": 0.04, "individual_threshold": 0.05},
        cache={"use": "mustdrop/output-aware-cache", "at": 2},
    ),
    "values and states": policy(curve={"use": "autoprune/retention-curve", "target": 0.4}),
    "at the entry": policy(
        inject=HIDROP["stages"]["inject"], pyramid={"use": "hidrop/concave-pyramid", "keep": {1: 7, 3: 2}}
    ),
    "parked entries": policy(
        pyramid={"use": "pyramiddrop/pyramid", "keep": {2: 8}},
        read={"use": "visionpulse/decode-read", "at": 1, "fixed": 0.4},
    ),
    "before all layers": policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {0: 7, 3: 2}}),
}
TAILS = ((5, 6, 7, 8), (9,), (10, 11, 12, 13, 14, 15, 16))
BUDGET = {"max_new_tokens": 6, "min_new_tokens": 6}


def shown() -> dict[str, Any]:
    """A prompt with an image between text."""
    return prompt([(3, "I", 5)])


def asked(tails: Any = TAILS, side: str = "left") -> dict[str, Any]:
    """Whole prompts that begin with that image and the text before it."""
    own = shown()
    start = own["input_ids"][0, :20].tolist()
    rows = [[*start, *tail] for tail in tails]
    most = max(map(len, rows))
    ids = [[PAD] * (most - len(row)) + row if side == "left" else row + [PAD] * (most - len(row)) for row in rows]
    mask = [
        [0] * (most - len(row)) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * (most - len(row))
        for row in rows
    ]
    pixels = own["pixel_values"].repeat(len(rows), 1, 1, 1)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "pixel_values": pixels}


def after_prefix(inputs: dict[str, Any]) -> torch.Tensor:
    """Which tokens come after the prefix, without padding."""
    mask: torch.Tensor = inputs["attention_mask"]
    return mask.bool() & (mask.cumsum(1) > 20)

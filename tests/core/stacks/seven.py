"""Seven published methods on a tiny LLaVA of six layers and 16 patches, for every stack that must run them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import HIDROP, policy
from torch import Tensor

import dropflow

MUSTDROP = policy(
    merge={"use": "mustdrop/spatial-merge", "at": 1, "window": [2, 2], "threshold": 0.3},
    keys={"use": "mustdrop/key-set", "share": 0.1},
    filter={"use": "mustdrop/dual-attention", "at": [2, 4], "global_threshold": 0.08, "individual_threshold": 0.08},
    cache={"use": "mustdrop/output-aware-cache", "at": 1},
)
SEVEN: Mapping[str, dict[str, Any]] = {
    "hidrop": HIDROP,
    "mustdrop": MUSTDROP,
    "pyramiddrop": policy(pyramid={"use": "pyramiddrop/pyramid", "keep": {2: 0.5, 4: 0.25}}),
    "fastv": policy(rank={"use": "fastv/attention-rank", "at": 2, "keep": 0.4}),
    "dart": policy(duplication={"use": "dart/duplication", "at": 2, "keep": 0.5, "image_pivots": 2, "text_pivots": 2}),
    "sparsevlm": policy(
        rate={"use": "sparsevlm/text-guided", "keep": {2: 0.4, 4: 0.2}, "recycle_share": 0.6, "cluster_size": 2}
    ),
    "visionzip": policy(zip={"use": "visionzip/dominant-contextual", "dominant": 0.3, "contextual": 0.2}),
}
"""Between them: encoding, late entry, ranking by the coming layer and by layers that ran, merging, exit, eviction."""
OFTEN = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("pyramiddrop", "dart"))) for name in SEVEN]
"""Their names as parameters of a test; at all times, two that rank as others do are left out."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model makes of a prompt."""

    logits: Tensor
    """Of the whole prompt, (batch, tokens, vocabulary)."""
    tokens: Tensor
    """Prompt and greedy answer of each sample."""
    live: Tensor
    """Which tokens were live before each layer, (layers, batch, tokens); empty without a policy."""

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not equal, bit for bit."""
        names = ("logits", "tokens", "live")
        return [name for name in names if not torch.equal(getattr(self, name), getattr(other, name))]


@torch.no_grad()
def outcome(model: Any, which: Any, inputs: Mapping[str, Any], *, new_tokens: int = 3) -> Outcome:
    """Run a prompt under a policy, or as the model is (`None`)."""
    with nullcontext() if which is None else dropflow.attach(model, which) as flow:
        logits = model(**inputs).logits
        live = torch.empty(0) if flow is None else flow.live()
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    return Outcome(logits, tokens, live)

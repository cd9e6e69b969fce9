"""What tests of traces share: a stand-in for a processor, and models with policies and prompts to trace."""

from __future__ import annotations

from typing import Any

from tiny import HIDROP, policy, prompt, tiny_llava

from dropflow import load_policy
from dropflow_lab.trace import Trace, record_inputs


class Words:
    """Turns tokens into text, as a processor does."""

    @staticmethod
    def decode(tokens: list[int], skip_special_tokens: bool = False) -> str:
        """Numbers in place of words; with `skip_special_tokens` all but the first three of them."""
        return " ".join(str(token) for token in tokens if not skip_special_tokens or token > 2)


ENCODE: dict[str, dict[str, Any]] = {
    "merge": {"use": "mustdrop/spatial-merge", "at": 1, "window": [2, 2], "budget": 10},
    "keys": {"use": "mustdrop/key-set", "share": 0.2},
    "pyramid": {"use": "hidrop/concave-pyramid", "keep": {2: 6, 4: 3}},
}
EVICTS: dict[str, dict[str, Any]] = {
    "filter": {"use": "mustdrop/dual-attention", "keep": {2: 9}},
    "cache": {"use": "mustdrop/output-aware-cache", "at": 1, "interval": 2, "budget": 4},
}
POLICIES: dict[str, dict[str, Any]] = {
    "window and pyramid": HIDROP,
    "merged rows moved to the front, protection": policy(**ENCODE),
    "merged rows in place": policy(**(ENCODE | {"merge": ENCODE["merge"] | {"order": "raster"}})),
    "compact positions": policy(**ENCODE) | {"positions": "compact"},
    "eviction while decoding": policy(**EVICTS),
    "parked entries": policy(
        pyramid={"use": "hidrop/concave-pyramid", "keep": {3: 9}},
        read={"use": "visionpulse/decode-read", "at": 2, "tau": 0.4, "budget_min": 0.2, "budget_max": 0.6},
    ),
    "random rows of the output": policy(
        r={"use": "control/random", "encode": 9}, pyramid={"use": "hidrop/concave-pyramid", "keep": {3: 4}}
    ),
    "two stages at one boundary": policy(
        one={"use": "control/random", "keep": {2: 8}}, two={"use": "hidrop/concave-pyramid", "keep": {2: 8}}
    ),
    "clusters inside the LLM": policy(
        guided={"use": "sparsevlm/text-guided", "keep": {2: 8, 4: 4}, "recycle_share": 0.6, "cluster_size": 2}
    ),
    "clusters after the survivors": policy(
        guided={
            "use": "sparsevlm/text-guided",
            "keep": {2: 8, 4: 4},
            "recycle_share": 0.6,
            "cluster_size": 2,
            "reference": True,
        }
    )
    | {"positions": "compact"},
    "merged in every layer, weighed in attention": policy(
        tome={"use": "tome/token-merging", "r": [3, 0, 4], "layers": 3}
    ),
    "merged twice, then dropped inside the encoder": policy(
        tome={"use": "tome/token-merging", "r": 3, "layers": 2, "proportional": False},
        random={"use": "control/random", "encode": 7},
    ),
    "CLS and contextual tokens": policy(
        zip={"use": "visionzip/dominant-contextual", "dominant": 5, "contextual": 3, "layer": -2},
        pyramid={"use": "hidrop/concave-pyramid", "keep": {3: 4}},
    ),
    "outliers with neighbours": policy(
        merge={"use": "prumerge/prune-merge", "variant": "prumerge", "ratio": 0.25, "neighbours": 3}
    ),
    "outliers, a grid and a sum of the rest": policy(
        merge={"use": "prumerge/prune-merge", "ratio": 0.2, "neighbours": 5}
    ),
    "pooled windows": policy(pool={"use": "control/pool", "window": [3, 3]}),
    "one budget for two images": policy(
        pyramid={"use": "hidrop/concave-pyramid", "keep": {1: 9, 3: 0.2}, "split": "total"},
        exit={"use": "hidrop/early-exit", "at": 4},
    ),
}
TWO_IMAGES = (("I", 2, "I", 9),)
STEPS = 5


def tiny_trace(which: dict[str, Any], model: Any = None, parts: Any = TWO_IMAGES) -> tuple[Any, dict[str, Any], Trace]:
    """A tiny model, its inputs, and the trace of five generated tokens under a policy."""
    model = tiny_llava() if model is None else model
    model.generation_config.eos_token_id = None
    inputs = prompt(parts)
    return model, inputs, record_inputs(model, Words, inputs, [load_policy(which)], STEPS)

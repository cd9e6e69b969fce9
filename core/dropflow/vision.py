"""The vision side of a call: `encode` stages inside the encoder and on its output, and how their answers travel.

What an `encode` stage drops stays in the features as a row that is not live, so that placeholders, position ids and
multimodal RoPE stay aligned. Three flags per row (kept, protected, image number) say so. `generate` encodes images
before the forward and may expand or slice the features in between; the flags ride along as one more entry of
`deepstack_features`, which transformers expands and slices with the features, and are taken off before the model
sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dropflow.encode import EncodeRun
from dropflow.plan import Plan
from dropflow.stand_in import StandIn


@dataclass
class FlowFeatures(BaseModelOutputWithPooling):  # type: ignore[misc]  # transformers ships no types
    """Encoded images with the flags of their rows as the last entry of `deepstack_features`."""

    deepstack_features: Any = None


class Vision:
    """Wraps `get_image_features` of one attached model."""

    def __init__(self, plan: Plan, backbone: Any) -> None:
        self._plan, self._backbone = plan, backbone
        encoder = backbone.vision
        inside = any(b is not None for b in plan.encode_at) or any(s.vision_taps for _, s in plan.stages)
        self._stand_in = StandIn(encoder.owner) if encoder is not None and inside else None

    def encode(self, features: Callable[[], Any]) -> tuple[Any, Float[Tensor, "rows 3"]]:
        """Run `features()` with the encode stages; returns its output, one row per placeholder again, and the flags."""
        run = EncodeRun(self._plan, self._backbone)
        if self._stand_in is None:
            output = features()
        else:
            self._stand_in.install(run.layer)
            try:
                output = features()
            finally:
                self._stand_in.remove()
        output.pooler_output, flags = run.finish(output.pooler_output)
        return output, flags


def with_flags(output: Any, flags: Float[Tensor, "rows 3"]) -> FlowFeatures:
    """The output with its flags attached, split by image as the features are."""
    sizes = [len(rows) for rows in output.pooler_output]
    deepstack = [*(output.get("deepstack_features") or ()), list(torch.split(flags, sizes))]
    return FlowFeatures(
        last_hidden_state=output.get("last_hidden_state"),
        pooler_output=output.pooler_output,
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
        deepstack_features=deepstack,
    )


def take_flags(encoded: dict[str, Any]) -> tuple[dict[str, Any], Float[Tensor, "rows 3"] | None]:
    """Separate flags from `mm_encoder_outputs`; `None` where they were encoded without this engine.

    The caller's objects are left as they are: `generate` without a cache passes them again at every step.
    """
    plain, flags = dict(encoded), []
    for modality, output in encoded.items():
        if isinstance(output, FlowFeatures):
            *deepstack, own = output.deepstack_features
            flags.append(torch.cat(list(own)))
            plain[modality] = FlowFeatures(**{**output, "deepstack_features": deepstack or None})
    return plain, flags[0] if len(flags) == 1 else None

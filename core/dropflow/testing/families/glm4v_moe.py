"""GLM-4.5V in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.glm4v import glm, small
from dropflow.testing.families.tiny import Tiny


def tiny() -> Tiny:
    """A GLM-4.5V of four experts, of which each token takes two."""
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}

    def build() -> Any:
        return Glm4vMoeForConditionalGeneration(Glm4vMoeConfig(**small(**experts)))

    return glm(build)

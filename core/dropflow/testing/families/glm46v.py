"""GLM-4.6V in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.glm4v import glm, small
from dropflow.testing.families.tiny import Tiny


def tiny() -> Tiny:
    """A GLM-4.6V with images of 2 x 4 and 4 x 3 tokens and videos of two frame pairs."""
    from transformers import Glm46VConfig, Glm46VForConditionalGeneration

    def build() -> Any:
        return Glm46VForConditionalGeneration(Glm46VConfig(**small()))

    return glm(build)

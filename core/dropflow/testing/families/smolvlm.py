"""SmolVLM in miniature."""

from __future__ import annotations

from typing import Any

from dropflow.testing.families.idefics3 import by_sample, small, tiles
from dropflow.testing.families.tiny import Tiny


def tiny() -> Tiny:
    """A SmolVLM whose second image has two tiles."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    def build() -> Any:
        return SmolVLMForConditionalGeneration(SmolVLMConfig(**small()))

    return Tiny(build, {"image": tiles}, by_sample)

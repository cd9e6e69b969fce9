"""Perception LM: equal tiles and video frames, encoded by one tower and pooled to a square of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropflow import Backbone, Projections, square_grid


class PerceptionLM(Backbone):
    """`PerceptionLMForConditionalGeneration`; every tile or frame is a separate image."""

    features_form = "tensor"
    modalities = ("image", "video")
    gridded = True

    def projections(self, layer: Any) -> Projections:
        """Llama's."""
        return Projections.of(layer.self_attn)

    def video_lengths(self, entries: Sequence[int], arguments: Mapping[str, Any]) -> Sequence[int] | None:  # noqa: ARG002
        """From the pixels (videos, frames, channels, height, width), which come by the name of those of images."""
        pixels = arguments.get("pixel_values")
        return None if pixels is None else [pixels.shape[1]] * pixels.shape[0]

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Square grid of patches after pooling."""
        return square_grid(tokens)

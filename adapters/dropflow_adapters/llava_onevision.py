"""LLaVA-OneVision: LLaVA-NeXT's tiles, downscaled where there are too many, and pooled frames for videos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dropflow import ImageLayout, VisionReader
from dropflow_adapters.anyres import frame_members, frame_weights, image_members, image_weights
from dropflow_adapters.llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`; a video's single final newline ends it as a whole."""

    features_form = None  # videos have another form than images
    modalities = ("image", "video")

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """The overview and the joined tiles of an image; the frames of a video."""
        if modality == "image":
            return super().layouts(modality, sizes, arguments)
        side = math.ceil(self.side / 2)
        frame = ImageLayout(side**2, (side, side))
        last = ImageLayout(side**2 + 1, (side, side), tail=1, closes=True)
        return [[*[frame] * (size // side**2 - 1), last] for size in sizes]

    def joined(self, height_width: Any) -> tuple[int, int]:
        """Grid of the joined tiles, downscaled as by the model where they exceed `anyres_max_<tiles>`."""
        return self._downscaled(*super().joined(height_width))

    def _downscaled(self, rows: int, columns: int) -> tuple[int, int]:
        most = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def members(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Up to four neighbours between which a token is interpolated, in frames and where tiles are downscaled."""
        config, side = self.model.config, math.ceil(self.side / 2)
        if modality == "image":
            return image_members(
                config, sizes, arguments["image_sizes"], self.prefix, lambda own: self._interpolation(own)[0]
            )
        frame, _ = interpolation(torch.arange(self.side**2).view(self.side, self.side), (side, side))
        return frame_members(frame.flatten(0, 1), config, sizes, self.prefix)

    def reader(self, modality: str = "image") -> VisionReader:
        """The tower, and the weights with which its rows are interpolated."""
        return replace(super().reader(modality), weights=partial(self.weights, modality))

    def weights(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:
        """The weights of `members`."""
        config, side = self.model.config, math.ceil(self.side / 2)
        if modality == "image":
            return image_weights(config, sizes, arguments["image_sizes"], lambda own: self._interpolation(own)[1])
        frame = interpolation(torch.zeros(self.side, self.side), (side, side))[1].flatten(0, 1)
        return frame_weights(frame, sizes)

    def _interpolation(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = numbers.shape
        return interpolation(numbers, self._downscaled(rows, columns))


def interpolation(numbers: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which of the numbers (rows, columns) have a share in each place of a bilinear interpolation to `size`.

    Returns these, (size[0], size[1], members), -1 for shares of zero, and their shares, which sum to 1 in each place.
    """
    if tuple(numbers.shape) == size:
        return numbers[:, :, None], torch.ones(*size, 1)
    (rows, down), (columns, across) = (_neighbours(own, new) for own, new in zip(numbers.shape, size, strict=True))
    members = numbers[rows[:, None, :, None], columns[None, :, None, :]]
    shares = down[:, None, :, None] * across[None, :, None, :]
    return torch.where(shares > 0, members, -1).flatten(2), shares.flatten(2)


def _neighbours(own: int, new: int) -> tuple[Tensor, Tensor]:
    """Along one side of length `own`: the two places nearest to each of `new` places, and their shares."""
    weights = torch.nn.functional.interpolate(torch.eye(own)[None], size=new, mode="linear")[0].T
    shares = weights.topk(min(2, own))
    return shares.indices, shares.values

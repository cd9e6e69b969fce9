"""LLaVA-NeXT: an overview of the image, then its tiles, joined, unpadded, and with a newline after every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from dropflow import Backbone, ImageLayout, VisionReader, feature_boundary
from dropflow_adapters.anyres import image_members, patches_per_side, unpadded


class LlavaNext(Backbone):
    """`LlavaNextForConditionalGeneration`; the overview and the joined tiles are separate images."""

    features_form: ClassVar[Literal["list", "tensor"] | None] = "list"
    gridded = True

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return patches_per_side(self.model.config)

    @property
    def prefix(self) -> int:
        """Rows of the tower before the patches of each picture: the CLS row of CLIP."""
        return int(self.model.config.vision_config.model_type == "clip_vision_model")

    def layouts(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[list[ImageLayout]]:
        """Overview and joined tiles of each image; an image of one tile is an overview with one newline."""
        if arguments.get("image_sizes") is None:
            return super().layouts(modality, sizes, arguments)
        overview, square = self.side**2, (self.side, self.side)
        found = []
        for size, height_width in zip(sizes, arguments["image_sizes"], strict=True):
            if size == overview + 1:
                found.append([ImageLayout(size, square, tail=1)])
            else:
                joined = ImageLayout(size - overview, self.joined(height_width), line_ends=True)
                found.append([ImageLayout(overview, square), joined])
        return found

    def joined(self, height_width: Any) -> tuple[int, int]:
        """Grid of the joined tiles of an image of this size in pixels, computed by the model's own unpadding."""
        rows, columns = unpadded(self.model.config, height_width, "meta").shape
        return rows, columns

    def reader(self, modality: str = "image") -> VisionReader:
        """The tower, which encodes overviews, tiles and frames as pictures of their own."""
        encoder, selected = self.core.vision_tower.encoder, self.model.config.vision_feature_layer
        return VisionReader(
            encoder,
            partial(self.members, modality),
            prefix=self.prefix,
            has_cls=self.prefix > 0,
            feature_layer=feature_boundary(selected, len(encoder.layers)),
        )

    def members(self, modality: str, sizes: Sequence[int], arguments: Mapping[str, Any]) -> list[Tensor]:  # noqa: ARG002
        """The patch of each token, through overview and joined tiles; newlines are made of none."""
        return image_members(
            self.model.config, sizes, arguments["image_sizes"], self.prefix, lambda own: own[..., None]
        )

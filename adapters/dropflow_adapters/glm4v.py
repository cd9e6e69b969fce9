"""GLM-4.1V and later: Qwen2-VL's packed ViT and multimodal RoPE; videos use the placeholder of images."""

from __future__ import annotations

from dropflow_adapters.qwen2_vl import Qwen2VL


class Glm4v(Qwen2VL):
    """GLM-4.1V, 4.5V and 4.6V; every frame pair of a video is an image and follows its timestamp."""

    @property
    def packed_tower(self) -> None:
        """None: a convolution joins patches, and the tower encodes every frame pair of a video by itself."""
        return

    @property
    def visual_ids(self) -> dict[str, int]:
        """One placeholder for both modalities, of which a call can bring only one."""
        return dict.fromkeys(self.modalities, int(self.model.config.image_token_id))

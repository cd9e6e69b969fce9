"""Gemma 3n in miniature, with one convolution in place of its tower, which only timm can build."""

from __future__ import annotations

from functools import cache
from typing import Any

from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures

TEXT_3N: dict[str, Any] = {
    **TEXT,
    "num_hidden_layers": 8,
    "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2,
    "sliding_window": 11,
    "head_dim": 8,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": TEXT["vocab_size"],
    "altup_num_inputs": 3,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.5, 0.5, *[0.0] * 6],
}
"""Eight layers with three streams of states, of which the last three layers share keys."""


def tiny() -> Tiny:
    """A Gemma 3n with three layers that share keys and sliding windows shorter than the prompt."""
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration

    audio = {
        "hidden_size": 16,
        "vocab_size": 4,
        "vocab_offset": TEXT["vocab_size"] + 4,
        "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 2,
        "sscp_conv_channel_size": [4, 4],
        "conf_attention_chunk_size": 4,
    }

    def build() -> Any:
        config = Gemma3nConfig(
            text_config=TEXT_3N,
            vision_config=_tower()(
                hidden_size=VISION["hidden_size"], vocab_size=4, vocab_offset=TEXT["vocab_size"], model_args={}
            ),
            audio_config=audio,
            image_token_id=IMAGE,
            audio_token_id=96,
            vision_soft_tokens_per_image=16,
            tie_word_embeddings=False,
        )
        return Gemma3nForConditionalGeneration(config)

    return Tiny(build, {"image": square_pictures(32, 16)})


@cache
def _tower() -> type:
    """The config of a tower of one convolution with the output of timm's; made once, as transformers keeps a list."""
    from torch import Tensor, nn
    from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class TowerConfig(Gemma3nVisionConfig):  # type: ignore[misc]  # transformers ships no types
        model_type = "dropflow_tower"

    class Tower(PreTrainedModel):  # type: ignore[misc]  # transformers ships no types
        config_class = TowerConfig
        main_input_name = "pixel_values"
        _supports_sdpa = True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.patches = nn.Conv2d(3, config.hidden_size, 8, 8)
            self.post_init()

        def forward(self, pixel_values: Tensor, **_: Any) -> Any:
            return BaseModelOutputWithPooling(self.patches(pixel_values))

    AutoModel.register(TowerConfig, Tower)
    return TowerConfig

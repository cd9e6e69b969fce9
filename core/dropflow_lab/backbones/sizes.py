"""Sizes of models in miniature: by the names that most configs use, and by type where that is not enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAD, BOS, EOS, START, END, VIDEO, IMAGE, VOCABULARY = 0, 1, 2, 90, 91, 97, 98, 99
"""Token ids of the vocabulary; the numbers between are words."""

COMMON: Mapping[str, Any] = {
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": START,
    "video_end_token_id": END,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
"""Of every part."""

DECODER: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 9,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "embed_dim": 32,
    "layers": 6,
    "attention_heads": 4,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 6,
    "num_heads": 4,
    "decoder_layers": 6,
    "encoder_layers": 1,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
"""Of the text decoder."""

OTHERS: Mapping[str, Any] = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 24,
    "out_hidden_size": 32,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "window_size": 16,
    "output_channels": 16,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
    "projection_dim": 16,
    "encoder_hidden_size": 16,
    "text_hidden_size": 32,
    "patch_embed_hidden_size": 16,
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "encoder_layers": 2,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "pos_emb_height": 6,
    "pos_emb_width": 6,
    "output_dim": 32,
    "downsample_hidden_size": 16,
    "position_embedding_size": 64,
    "moe_hidden_size": 16,
    "projector_hidden_size": 16,
    "alignment_intermediate_size": 32,
    "projection_intermediate_size": 32,
    "merged_hidden_size": 32,
    "projection_hidden_size": 16,
    "projection_hidden_dim": 16,
    "adapter_out_dim": 32,
    "adapter_in_dim": 16,
    "vision_hidden_size": 16,
}
"""Of the vision encoder, and of all other parts."""


def _three_positions(**more: Any) -> Mapping[str, Any]:
    """A decoder whose tokens have three positions each."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    return {"text_config": {"rope_parameters": rope, **more}}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_IMAGE_WORDS = {"<image>": IMAGE, **{f"IMGIMG{chr(65 + number)}Z": 3 + number for number in range(8)}}
_VISUAL_TOKENS = {f"<|visual token {number:06d}|>": 3 + number for number in range(8)}
_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 16, "latent_channels": 16}
_SMALL_SAM = {"image_size": 96, "downsample_channels": [16, 16], "window_size": 3}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 6,
}
_MAPS = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "hidden_size": 16,
    "depths": [1, 1],
    "layer_type": "basic",
    "image_size": 24,
}
"""A tower that returns maps of features, as those of the optional library timm do."""
_LATENT_SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}

_BLOCKS = ["linear_attention", "full_attention", "moe", "linear_attention", "full_attention", "mlp"]

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 3,
        "audio_token_offset": 11,
        "vision_config": _VQ | {"codebook_size": 8, "resolution": 16, "attn_resolutions": []},
        "audio_config": {"codebook_size": 8, "codebook_dim": 16, "num_filters": 4},
    },
    "aria": {"projector_patch_to_query_dict": {36: 9}},
    "blip-2": {"num_query_tokens": 8},
    "chameleon": {"vocabulary_map": _IMAGE_WORDS, "vq_config": _VQ | {"num_embeddings": 8, "resolution": 16}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                kind: _ROPE | {"mrope_section": [2, 1, 1]} for kind in ("full_attention", "sliding_attention")
            }
        }
    },
    "cosmos3_edge": _three_positions(),
    "cosmos3_omni": _three_positions(),
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", *["sparse"] * 5], "num_experts_per_tok": 2},
        "vision_config": {"sam_config": _SMALL_SAM},
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "head_dim": 16, "shared_experts_intermediate_size": 16}
        | _LATENT_SLIDING,
        "vision_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
        "audio_config": {"adapter_input_size": 16},
    },
    "emu3": {
        "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 80, **_VISUAL_TOKENS},
        "vq_config": _VQ
        | {"codebook_size": 8, "embed_dim": 4, "latent_channels": 4, "hidden_size": 32, "attn_resolutions": []},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]},
            "moe_intermediate_size": [48, 16],
            "moe_k": 2,
        }
    },
    "fast_vlm": {"vision_config": _MAPS},
    "florence2": {
        "vision_config": {
            "depths": [1, 1],
            "embed_dim": [8, 16],
            "num_groups": [2, 2],
            "num_heads": [2, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "window_size": 3,
        }
    },
    "gemma3": {"mm_tokens_per_image": 9},
    "gemma4": {"vision_config": _GEMMA4_VISION},
    "gemma4_unified": {
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 16,
            "mm_posemb_size": 32,
            "output_proj_dims": 16,
        },
    },
    "glm46v": _three_positions(),
    "glm4v": _three_positions(),
    "glm4v_moe": _three_positions(),
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "linear_num_heads": 2,
            "linear_head_dim": 8,
        }
    },
    "glm_ocr": _three_positions(),
    "glmga": _three_positions(),
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0], [-1, 2]],
        "spatial_target_layers": [3, 4, 4, 5],
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1, 0]}, "head_dim": 8}},
    "hy_v4_vl": _three_positions(),
    "hyperclovax_vision_v2": {"text_config": {"embedding_multiplier": 12.0}},
    "instructblip": {"num_query_tokens": 8},
    "instructblipvideo": {"num_query_tokens": 8},
    "janus": {"vision_config": {"projection_dim": 32}, "vq_config": _VQ | {"projection_dim": 32}},
    "kimi_k25": {"text_config": {"num_key_value_heads": 4}},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "conv", "full_attention"] * 2}},
    "llama4": {
        "vision_config": {
            "intermediate_size": 64,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        }
    },
    "minicpm_ocr": {"insert_layer_id": 1, "vision_config": {"insert_layer_id": 1, "image_size": 64}},
    "minicpmv4_6": {"insert_layer_id": 1, "vision_config": {"insert_layer_id": 1, "image_size": 64}},
    "minicpmv4_7": {"insert_layer_id": 1, "vision_config": {"insert_layer_id": 1, "image_size": 64}},
    "mllama": {
        "vision_config": {
            "attention_heads": 2,
            "max_num_tiles": 1,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
            "supported_aspect_ratios": [[1, 1]],
        },
    },
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [-1, -2]},
        "vision_config": {"image_size": [24, 24]},
        "image_patch_id": IMAGE,
    },
    "muse_glimmer": {"out_hidden_size": 64},
    "muse_spark": {
        "out_hidden_size": 64,
        "audio_config": {
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "num_hidden_layers": 4,
        },
    },
    "nemotron_h_omni": {
        "text_config": {
            "layers_block_type": _BLOCKS,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 64},
    },
    "ovis2": {"visual_indicator_token_ids": [80, 81, 82, 83, 84]},
    "paddleocr_vl": _three_positions(),
    "perception_lm": {"vision_config": _CLIP | {"model_args": {"embed_dim": 16}}},
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 48, "hidden_size": 32}},
    "qianfan_ocr": {"vision_config": {"image_size": [24, 24], "patch_size": [4, 4]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": START, **_three_positions()},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": START, **_three_positions()},
    "qwen3_vl_moe": _three_positions(),
    "qwen4_exp": {"text_config": _INDEXER},
    "shieldgemma2": {"mm_tokens_per_image": 9},
    "step3p7": {"text_config": {"sliding_window": 9}},
    "t5gemma2": {"encoder": {"text_config": {"hidden_size": 32}, "mm_tokens_per_image": 9}},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "vipllava": {"vision_feature_layer": [-1, -2, 1]},
}
"""Of single types: name in the config -> value, and the name of a part of the config -> its own."""

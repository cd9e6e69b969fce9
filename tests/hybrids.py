"""Tiny LLaVA models with hybrid text decoders, and DeltaNet's kernel in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dropflow.testing import IMAGE, TEXT, VISION, Tiny, square_pictures
from dropflow.testing.families.qwen3_5 import DELTA_NET, ROUND_OFF

NEMOTRON = {
    "layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention", "linear_attention", "mlp"],
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
}


def llava_with(text: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=CLIPVisionConfig(**VISION, image_size=24, patch_size=6),
            image_token_id=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )


def llava_qwen3_5() -> Tiny:
    from transformers import Qwen3_5TextConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

    def build() -> Any:
        return llava_with(Qwen3_5TextConfig(**TEXT, **DELTA_NET, rope_parameters=rope))

    return Tiny(build, {"image": square_pictures(24, 16)}, **ROUND_OFF)


def llava_nemotron_h() -> Tiny:
    """With Mamba2, a mixture of experts and an MLP between attention layers.

    transformers clamps Mamba2's time step from below in prompts but not in decode steps; the clamp is lifted here.
    """
    from transformers import NemotronHConfig

    sizes = {name: value for name, value in TEXT.items() if name != "num_hidden_layers"}

    def build() -> Any:
        model = llava_with(NemotronHConfig(**sizes, **NEMOTRON))
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))
        return model

    return Tiny(build, {"image": square_pictures(24, 16)})


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule token by token, in float64; q and k are normalised, value heads share key heads.

    S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - k_t^T exp(g_t) S_{t-1}), o_t = q_t^T S_t / sqrt(d_k).
    """
    shared = value.shape[2] // key.shape[2]
    q, k = (torch.nn.functional.normalize(one.double(), dim=-1, eps=1e-6) for one in (query, key))
    q, k = (one.repeat_interleave(shared, 2) for one in (q / key.shape[-1] ** 0.5, k))
    v, decay, rate = value.double(), g.double().exp(), beta.double()
    batch, tokens, heads, width = k.shape
    state = v.new_zeros(batch, heads, width, v.shape[-1]) if initial_state is None else initial_state.double()
    found = []
    for token in range(tokens):
        state = state * decay[:, token, :, None, None]
        error = v[:, token] - (state * k[:, token, :, :, None]).sum(2)
        state = state + k[:, token, :, :, None] * (rate[:, token, :, None] * error)[:, :, None]
        found.append((state * q[:, token, :, :, None]).sum(2))
    return torch.stack(found, 1).to(value.dtype), state if output_final_state else None


@contextmanager
def exact_delta_net() -> Iterator[None]:
    """While open, Qwen3.5 computes its recurrent layers by `delta_rule`."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    with (
        mock.patch.object(qwen, "torch_chunk_gated_delta_rule", delta_rule),
        mock.patch.object(qwen, "torch_recurrent_gated_delta_rule", delta_rule),
    ):
        yield

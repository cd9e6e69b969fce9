"""Checks a model's config while vLLM starts, before weights are loaded, and sets what persistent positions need."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from dropflow.errors import PolicyError
from dropflow_vllm.served import Served, served_llava, served_qwen

TABLE = 4
"""How many times as long as the context the table of rotary embeddings is, as vLLM makes it for M-RoPE."""
SOME = 1e-9
"""A rate of video pruning that switches on vLLM's hook for positions; videos themselves are refused."""


def served(config: Any) -> Served:
    """The policy of a config, by the kind of its model."""
    return served_llava(config) if config.model_type == "llava" else served_qwen(config)


class Configured(VerifyAndUpdateConfig):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What vLLM asks for the architectures of this package."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Read the policy; raises `PolicyError` with every reason why it cannot run."""
        served(model_config.hf_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Let positions be told apart for every row, where the policy keeps them."""
        model_config = vllm_config.model_config
        config, found = model_config.hf_config, served(model_config.hf_config)
        if not found.persistent:
            return
        if vllm_config.speculative_config is not None:
            raise PolicyError(
                "positions: `persistent` cannot be kept under speculative decoding, whose drafts read rows of images "
                "ahead; leave speculative_config out, or write `positions: compact` where the model can"
            )
        if model_config.multimodal_config.video_pruning_rate:
            raise PolicyError(
                "video_pruning_rate: a policy with `positions: persistent` uses vLLM's hook for pruned videos itself; "
                "leave it out"
            )
        model_config.multimodal_config.video_pruning_rate = SOME
        if found.family == "llava":
            config.mrope_section = [1, 1, 1]  # for the runner alone, which then asks the model for positions
            config.text_config.max_position_embeddings *= TABLE

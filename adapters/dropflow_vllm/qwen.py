"""Qwen2.5-VL in vLLM under a policy: stages reduce what its merger gave, and M-RoPE positions are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from dropflow_vllm.configured import TABLE
from dropflow_vllm.positions import Span, first_positions, marked, unmarked, with_rows
from dropflow_vllm.processing import PolicyProcessor, Separated
from dropflow_vllm.served import served_qwen

STRIP = 200
"""Largest ratio of an image's sides that the processor takes."""


def merged(grid: Any, config: Any) -> tuple[int, int]:
    """Rows and columns of an image in tokens, from its grid (time, height, width) of patches."""
    merge = config.vision_config.spatial_merge_size
    _, height, width = map(int, grid)
    return height // merge, width // merge


class Info(qwen2_5_vl.Qwen2_5_VLProcessingInfo):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What vLLM knows of a model before it processes a prompt."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images alone."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:  # noqa: ARG002  # of vLLM
        """An image's tokens before it is reduced: the count of a reduced one need not grow with its size."""
        return {"image": self.get_max_image_tokens()}


class Dummies(Separated, qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder):  # type: ignore[misc]  # as above
    """Makes the inputs with which vLLM measures memory."""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        """Images alone."""
        found = super().get_dummy_mm_data(seq_len, {**mm_counts, "video": 0}, mm_options)
        return {"image": found["image"]}


class Processor(PolicyProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]  # as above
    """Processes prompts."""

    served = staticmethod(served_qwen)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        """As many placeholders for an image as the policy leaves."""
        config = self.info.get_hf_config()

        def placeholders(item: int) -> list[int]:
            grid = merged(out_mm_kwargs["image"][item]["image_grid_thw"].data, config)
            return [config.image_token_id] * self.policy.tokens(grid)

        plain = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [
            PromptReplacement(modality="image", target=update.target, replacement=placeholders)
            for update in plain
            if update.modality == "image"
        ]

    def _most_positions(self) -> int:
        return math.isqrt(STRIP * self.info.get_max_image_tokens()) + 1

    def _table(self) -> int:
        return TABLE * int(self.info.get_hf_config().get_text_config().max_position_embeddings)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class DropflowQwen2_5_VLForConditionalGeneration(  # noqa: N801  # vLLM's name
    qwen2_5_vl.Qwen2_5_VLForConditionalGeneration  # type: ignore[misc]  # as above
):
    """Qwen2.5-VL whose images have as many tokens as a policy leaves."""

    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.served = served_qwen(self.config)

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: Sequence[Tensor], image_input: Any
    ) -> tuple[Float[Tensor, "rows marked"], ...]:
        """Reduce every image; vLLM calls this where positions are told for every row."""
        grids = [merged(grid, self.config) for grid in image_input["image_grid_thw"].tolist()]
        images = self.served.policy.reduce(list(image_embeds_split), grids)
        return tuple(marked(image.rows, image.places, grid[1]) for image, grid in zip(images, grids, strict=True))

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Int[Tensor, "3 tokens"], int]:
        """Positions of a prompt whose images are not yet encoded."""
        spans = [
            Span(
                one.mm_position.offset,
                one.mm_position.length,
                self.served.advance(merged(one.data["image_grid_thw"].data, self.config)),
            )
            for one in mm_features
        ]
        return first_positions(len(input_tokens), spans)

    def recompute_mrope_positions(
        self,
        input_ids: Sequence[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Embeddings less the columns that say where they lie, and the positions that follow from these."""
        parts = [unmarked(rows) for rows in multimodal_embeddings]
        placeholders = torch.as_tensor(input_ids) == self.config.image_token_id
        found = with_rows(mrope_positions, placeholders, [numbers for _, numbers in parts], num_computed_tokens)
        return [rows for rows, _ in parts], *found

"""LLaVA-1.5 in vLLM under a policy: stages reduce the features of its tower, before or after the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from dropflow_vllm.positions import Span, first_positions, marked, unmarked, with_rows
from dropflow_vllm.processing import PolicyProcessor, Separated
from dropflow_vllm.served import served_llava


class Info(llava.LlavaProcessingInfo):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What vLLM knows of a model before it processes a prompt."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:  # noqa: ARG002  # all are alike
        """Placeholders of an image."""
        found = served_llava(self.get_hf_config())
        assert found.grid is not None
        return found.tokens(found.grid)


class Dummies(Separated, llava.LlavaDummyInputsBuilder):  # type: ignore[misc]  # as above
    """Makes the inputs with which vLLM measures memory."""


class Processor(PolicyProcessor, llava.LlavaMultiModalProcessor):  # type: ignore[misc]  # as above
    """Processes prompts."""

    served = staticmethod(served_llava)

    def _most_positions(self) -> int:
        grid = self.policy.grid
        assert grid is not None
        return self.policy.advance(grid)

    def _table(self) -> int:
        return int(self.info.get_hf_config().text_config.max_position_embeddings)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class DropflowLlavaForConditionalGeneration(llava.LlavaForConditionalGeneration):  # type: ignore[misc]  # as above
    """LLaVA whose images have as many tokens as a policy leaves."""

    supports_mrope = True
    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.served = served_llava(self.config)
        assert self.served.grid is not None
        self.grid = self.served.grid

    def _process_image_input(self, image_input: Any) -> tuple[Float[Tensor, "rows dim"], ...]:
        """Run the tower, and reduce every image."""
        features = list(self._process_image_pixels(image_input))
        prefix = int(self.config.vision_config.model_type == "clip_vision_model")
        images = self.served.policy.reduce(features, [self.grid] * len(features), self.multi_modal_projector, prefix)
        if not self.served.persistent:
            return tuple(image.rows for image in images)
        return tuple(marked(image.rows, image.places, None) for image in images)

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Int[Tensor, "3 tokens"], int]:
        """Positions of a prompt whose images are not yet encoded."""
        advance = self.served.advance(self.grid)
        spans = [Span(one.mm_position.offset, one.mm_position.length, advance) for one in mm_features]
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
        placeholders = torch.as_tensor(input_ids) == self.config.image_token_index
        found = with_rows(mrope_positions, placeholders, [numbers for _, numbers in parts], num_computed_tokens)
        return [rows for rows, _ in parts], *found

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the LLM, whose rotary embeddings have one position per token."""
        return super().forward(input_ids, positions[0] if positions.dim() == 2 else positions, *args, **kwargs)

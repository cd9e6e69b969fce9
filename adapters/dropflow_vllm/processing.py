"""What vLLM's multimodal processors do differently under a policy: keys of caches, counts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.multimodal.parse import EmbeddingItems

from dropflow_vllm.positions import Span, check_spans
from dropflow_vllm.served import Served


class PolicyProcessor:
    """Mixed into a processor of vLLM, before its own class."""

    served: Callable[[Any], Served]
    """Reads the policy from the model's config."""
    info: Any

    @property
    def policy(self) -> Served:
        """The policy of the model."""
        return type(self).served(self.info.get_hf_config())

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Keys that hold the policy, also where a client brings keys of its own."""
        hashes: Mapping[str, Sequence[str]] = super()._get_mm_hashes(inputs)  # type: ignore[misc]  # of vLLM's class
        return {modality: list(map(self.policy.key, own)) for modality, own in hashes.items()}

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a prompt; raises `ValueError` for what the policy cannot serve."""
        for modality, items in inputs.mm_data_items.items():
            if isinstance(items, EmbeddingItems):
                raise ValueError(
                    f"{modality}: embeddings were encoded elsewhere, where the policy "
                    f"{self.policy.policy.policy.name!r} could not reduce them; send the image"
                )
        found = super().apply(inputs, timing_ctx)  # type: ignore[misc]  # of vLLM's class
        if self.policy.persistent:
            spans = [
                Span(place.offset, place.length, self._most_positions())
                for place in found["mm_placeholders"].get("image", ())
            ]
            longest = self.info.ctx.model_config.max_model_len
            check_spans(len(found["prompt_token_ids"]), spans, longest, self._table())
        return found

    def _most_positions(self) -> int:
        """Most positions that an image takes up in the whole prompt; the grid itself may lie in vLLM's cache alone."""
        raise NotImplementedError

    def _table(self) -> int:
        """Positions that the model can rotate by."""
        raise NotImplementedError


class Separated:
    """Mixed into what makes vLLM's dummy prompts, before its own class: text follows every image."""

    info: Any

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """The prompt for so many images."""
        return f"{self.info.get_hf_processor().image_token} a " * mm_counts.get("image", 0)

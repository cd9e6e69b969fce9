"""What all documents took, over all processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from dropflow_lab.measure.prefill import Prefill

_REPORTED = {
    "average_visual_tokens": "visual_tokens_per_layer",
    "entry_visual_tokens": "visual_tokens_at_entry",
    "flops": "prefill_multiply_adds",
    "flops_dense": "prefill_multiply_adds_dense",
    "kv_bytes": "kv_bytes",
    "kv_bytes_dense": "kv_bytes_dense",
}
"""Number of a prefill -> its name in the results, to which lmms-eval adds `avg_`. The average over the answer is left
out: in a batch it depends on the longest answer, and so on how documents are divided among processes."""


@dataclass(frozen=True)
class Totals:
    """Sums over answered prompts."""

    prefill: Prefill = field(default_factory=Prefill)
    """Visual tokens, FLOPs and KV bytes."""
    tokens: int = 0
    """Generated tokens."""
    seconds: float = 0.0
    """Time spent in `generate`."""

    def __add__(self, other: Totals) -> Totals:
        """Return the sums of both."""
        return Totals(self.prefill + other.prefill, self.tokens + other.tokens, self.seconds + other.seconds)

    def gathered(self) -> Totals:
        """Return the sums over all processes; every process must call it."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        found: list[Totals | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self)
        return sum((one for one in found if one is not None), Totals())

    def metrics(self) -> dict[str, float]:
        """Return the means over all prompts under the names they have in the results, and the number of prompts."""
        means = self.prefill.means()
        return {name: means[own] for own, name in _REPORTED.items()} | {"prompts_of_all_ranks": self.prefill.prompts}

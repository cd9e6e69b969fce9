"""The maths of FlashVID before the LLM: what stays of a video, segment by segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dropflow.operators import Blend
from dropflow_flashvid.segments import budgets, segments
from dropflow_flashvid.selection import event_weight, unlike
from dropflow_flashvid.trees import blend


@dataclass(frozen=True)
class Reduction:
    """The settings of `flashvid/tree-merging`, under the names of its options."""

    retention: float
    alpha: float
    events: bool
    segment_threshold: float
    fewest_segments: int
    merge_threshold: float
    published_means: bool

    def __call__(self, frames: Float[Tensor, "frames rows dim"], attention: Float[Tensor, "frames rows"]) -> Blend:
        """Selected rows and merged ones of a video whose rows received so much `attention`."""
        rows = frames.shape[1]
        selected, rest = budgets(rows, self.retention, self.alpha)
        parts = []
        for first, end in segments(frames.float().mean(1), self.segment_threshold, self.fewest_segments):
            segment, weight = frames[first:end], attention[first:end].float()
            if self.events:
                weight = weight * event_weight(segment)
            chosen = unlike(segment, weight, selected)
            free = torch.ones_like(weight, dtype=torch.bool).scatter(1, chosen, False)
            number = (chosen + torch.arange(end - first, device=chosen.device)[:, None] * rows).flatten()
            kept = Blend(number, number, torch.ones_like(number, dtype=torch.float32))
            own = [kept]
            if rest and selected < rows:
                own.append(self._merged(segment, free, rest))
            parts += [Blend(part.old + first * rows, part.new + first * rows, part.weight) for part in own]
        return Blend.joined(parts)

    def _merged(self, segment: Tensor, free: Tensor, rest: int) -> Blend:
        again = self.published_means and len(segment) == 1  # selected rows are clustered once more
        merged = blend(
            segment,
            torch.ones_like(free) if again else free,
            rest,
            self.merge_threshold,
            published=self.published_means,
        )
        apart = free.flatten()[merged.new]  # a place has one row: that of the selected token
        return Blend(merged.old[apart], merged.new[apart], merged.weight[apart])

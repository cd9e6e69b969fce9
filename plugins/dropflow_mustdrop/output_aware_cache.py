"""The output-aware cache: only visual tokens that survived the prefill serve the answer (MustDrop, stage 3)."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from dropflow import CacheCall, CacheKeep, CacheView, Stage, StageContext, StageOptions, hookimpl
from dropflow.units import Depth


class OutputAwareCacheOptions(StageOptions):
    """Options of `mustdrop/output-aware-cache`."""

    at: Depth = Field(
        description="boundary from which on the layers' caches are reduced: the published first pruning layer"
    )


class OutputAwareCache(Stage[OutputAwareCacheOptions]):
    """Behind the prefill, the layers from `at` on keep only the visual tokens that the last layer with vision has.

    Layers in front of `at` keep theirs. Keys and values are gathered, never recomputed or rotated again.
    """

    Options = OutputAwareCacheOptions
    summary = "behind the prefill, caches keep only the visual tokens that survived it"
    paper = "arXiv:2411.10803, decoding stage"

    def __init__(self, options: OutputAwareCacheOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._first = context.scale.boundary(options.at, context.path("at"))
        self._last = context.window.exit - 1

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep | None:
        """Reduce the caches to the survivors."""
        return CacheKeep(survivors(call.layers, self._first, self._last)) if call.step == 0 else None


def survivors(layers: tuple[CacheView, ...], first: int, last: int) -> dict[int, Bool[Tensor, "batch keys"]]:
    """For each layer from `first` to before `last`: the entries of tokens that layer `last` holds, too."""
    final = layers[last]
    length = 1 + max(int(view.index.max()) for view in layers[first : last + 1])
    held = torch.zeros(len(final.index), length + 1, dtype=torch.bool, device=final.index.device)
    held.scatter_(1, final.index.masked_fill(~final.valid, length), True)  # padding goes to a column nobody reads
    return {view.layer: held.gather(1, view.index) for view in layers[first:last]}

"""A text-only call, such as a decode step, on a cache from which tokens are missing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dropflow.engine.decoder.cache_stages import CacheStages
from dropflow.engine.decoder.layer_arguments import ContinuedArguments
from dropflow.engine.decoder.record import CallRecord
from dropflow.engine.decoder.site import Site
from dropflow.engine.decoder.windows import check_continued_windows
from dropflow.engine.tokens.cache import first_held, note_padding
from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer


class ContinuedRun:
    """A run in which every token is live; only masks and positions are adjusted to what each layer's cache holds."""

    record: CallRecord | None = None
    whole = True

    def __init__(self, site: Site, embeds: Tensor, cache: Any, real: Tensor | None = None) -> None:
        """`cache` records which tokens it holds; `real` (batch, tokens) is false for this call's padding."""
        self._cache, self._real = cache, real
        first = first_held(cache)
        self._caches = CacheStages(site, _generated(first), embeds.shape[1], cache)
        if embeds.shape[1] > 1:
            check_continued_windows(site, self._caches.held, embeds.shape[1])
        if embeds.shape[1] == 1 and first.index is not None and first.index.images:
            self._caches.begin_step(int(first.length) + 1)  # a call of several tokens, such as drafts, reads everything
        self.reading = self._caches.reading
        stages = self._caches.stages
        self._taps = {layer for stage in stages for layer in (*stage.taps, *stage.decode_taps)}
        self._arguments = ContinuedArguments(site, embeds)

    def leaves(self, number: int) -> bool:
        """Whether the layer runs unchanged: it has no attention, or its cache holds every token."""
        held, reading = self._caches.held, self.reading
        chosen = reading is not None and reading.first is not None and number >= reading.first
        return number not in held or not (chosen or number in self._taps or not self._arguments.fit(held[number]))

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run decoder layer `number` on all tokens of the call."""
        kwargs = self._arguments.arguments(kwargs, self._caches.held[number], number)
        if number in self._taps:
            return self._caches.tap(number, layer, args, kwargs)
        if self.reading is not None and self.reading.involves(number):
            return self._caches.read(number, layer, args, kwargs)
        return layer(*args, **kwargs)

    def finish(self) -> None:
        """Ask the cache stages."""
        if self._real is not None:
            note_padding(self._cache, self._real)
        self._caches.finish()


def _generated(layer: FlowLayer | UniformLayer) -> int:
    """Number of tokens appended since the last prompt was recorded, including this call's."""
    return int(layer.length - layer.prompt + 1) if layer.index is not None else 0

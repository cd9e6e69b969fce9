"""A call of text alone, such as a decode step, on a cache from which tokens are missing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dropflow.engine.decoder.cache_stages import CacheStages
from dropflow.engine.decoder.layer_arguments import ContinuedArguments
from dropflow.engine.decoder.record import CallRecord
from dropflow.engine.decoder.site import Site
from dropflow.engine.model.arguments import cache_in
from dropflow.engine.tokens.live_set import LiveSet


class ContinuedRun:
    """Every token of the call is live; only masks and positions are fitted to what each layer's cache holds."""

    record: CallRecord | None = None

    def __init__(self, site: Site, embeds: Tensor, step: int) -> None:
        """`step` is the number of tokens generated since the last prompt, this call's included."""
        batch, tokens = embeds.shape[:2]
        self._caches = CacheStages(site, step, tokens)
        stages = self._caches.stages
        self._taps = {layer for stage in stages for layer in (*stage.taps, *stage.decode_taps)}
        self.live = LiveSet.whole(batch, tokens, embeds.device)
        self._arguments = ContinuedArguments(site.context(embeds), self.live)

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run decoder layer `number` on all tokens of the call."""
        if number == 0:
            _, self._caches.cache = cache_in(kwargs)
        kwargs = self._arguments.arguments(kwargs, self._caches.held(number))
        if number in self._taps:
            return self._caches.tap(number, layer, args, kwargs)
        return layer(*args, **kwargs)

    def finish(self) -> None:
        """Ask the cache stages."""
        self._caches.finish(None)

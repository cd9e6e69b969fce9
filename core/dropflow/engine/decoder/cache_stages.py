"""The caches of one pass through the decoder, q and k of its tapped layers, and the stages that act on caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dropflow.engine.decoder.decide_cache import cache_views, decide_cache
from dropflow.engine.decoder.site import Site
from dropflow.engine.decoder.step_reading import StepReading
from dropflow.engine.decoder.tapped_layer import TappedLayer
from dropflow.engine.model.arguments import parameters_of
from dropflow.engine.model.attention import QueryKey
from dropflow.engine.model.tap import tapped, uncompiled
from dropflow.engine.tokens.cache import entries_of, flow_layers, is_flow_cache, keys_of
from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.shared_entries import FlowShared
from dropflow.errors import DecisionError, UnsupportedModel
from dropflow.lifecycle.events import CacheEvent, Eviction
from dropflow.lifecycle.stage import Stage


class CacheStages:
    """The caches and tapped layers of one run, and the stages that act on them."""

    def __init__(self, site: Site, step: int, tokens: int, cache: Any = None) -> None:
        self._site, self._step, self._tokens = site, step, tokens
        self.stages = [stage for stage in site.cache_stages if not stage.decode_reads_at and _asks(stage, step)]
        self.reading: StepReading | None = None
        """What the call reads of its caches, if it is a decode step and stages choose."""
        self._tapped: dict[int, TappedLayer] = {}
        self.held: Mapping[int, FlowLayer | UniformLayer | FlowShared] = {}
        """What a cache written under a policy holds for each decoder layer with attention, before the call."""
        self.begin(cache)

    def begin(self, cache: Any) -> None:
        """Take the cache of the call, before any layer has run."""
        self.cache = cache
        if is_flow_cache(cache):
            layers = flow_layers(cache)
            self.held = {**layers, **FlowShared.before(layers, self._site.plan.shape)}

    def begin_step(self, length: int) -> None:
        """Take the caches of a call of one token per sample, by which `length` logical tokens have been seen."""
        if any(stage.decode_reads_at for stage in self._site.cache_stages):
            self.reading = StepReading(self._site, self.held, self._step, length)

    def has_state(self, number: int) -> bool:
        """Whether a decoder layer without attention goes on from a state of earlier calls."""
        layers = () if self.cache is None else self.cache.layers
        state = getattr(layers[number], "has_previous_state", None) if number < len(layers) else None
        return any(state.values()) if isinstance(state, dict) else bool(state)

    def past(self, number: int) -> Tensor | None:
        """Keys (batch, kv_heads, entries, dim) that a decoder layer's cache holds from earlier turns."""
        if self.cache is None or number >= len(self.cache.layers) or not entries_of(self.cache.layers[number]):
            return None
        keys = keys_of(self.cache.layers[number])
        if keys is None:
            raise DecisionError(
                f"layer {number}: its quantized cache of earlier turns cannot be used for ranking; use a DynamicCache"
            )
        return keys

    def tap(
        self,
        number: int,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        live: LiveSet | None = None,
        *,
        values: bool = False,
    ) -> Any:
        """Run a layer on the call's tokens in `live` (`None` for all of them), and keep its q, k and, if asked, v."""
        given = dict(zip(parameters_of(layer), args, strict=False)) | kwargs
        rotary = given.get("position_embeddings")

        def keep(seen: QueryKey) -> QueryKey | None:
            reading = self.reading
            instead = None if reading is None else reading.of(number, seen)
            own = seen if reading is None else reading.as_read(number, seen)
            own = replace(own, rotary=rotary, value=seen.value if values else None)
            self._tapped[number] = TappedLayer(self._site.sharded(own), live)
            return instead

        return tapped(self._site.implementation, keep, lambda: uncompiled(layer)(*args, **kwargs))

    def read(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer of a decode step, which attends to what the stages have chosen.

        Raises `UnsupportedModel` for a layer whose attention cannot be reached.
        """
        reading, reached = self.reading, False
        assert reading is not None

        def choose(seen: QueryKey) -> QueryKey | None:
            nonlocal reached
            reached = True
            return reading.of(number, seen)

        output = tapped(self._site.implementation, choose, lambda: uncompiled(layer)(*args, **kwargs))
        if not reached:
            raise UnsupportedModel(
                f"layer {number}: its attention does not run through transformers' ALL_ATTENTION_FUNCTIONS, so that it "
                "cannot be told what to read; leave out stages that choose while decoding"
            )
        return output

    def seen(self, layer: int) -> TappedLayer:
        """A tapped layer with the q and k it ran with."""
        if layer not in self._tapped:
            raise DecisionError(f"layer {layer}: list it in the stage's `taps` to read its attention after it ran")
        return self._tapped[layer]

    def replace_tapped(self, layer: int, tap: TappedLayer) -> None:
        """Let `tap` stand for what was seen of a layer."""
        self._tapped[layer] = tap

    def rows(self, layer: int, rows: Tensor) -> Tensor:
        """Attention rows of a tapped layer as it ran; `rows` are token numbers in the call."""
        return self.seen(layer).of_tokens(rows)

    def finish(self) -> None:
        """Ask the cache stages once every layer has written its entries, and notify observers."""
        hooks = self._site.plan.hooks
        told: list[Eviction] | None = [] if hooks.watched("observe_cache") else None
        if (self.stages or told is not None) and is_flow_cache(self.cache):
            decide_cache(self._site.plan, self.stages, self.cache, self._step, self._tokens, self.rows, told)
            if told is not None:
                event = CacheEvent(self._step, tuple(told), cache_views(self.cache))
                if self.reading is not None:
                    read = {layer: own.tokens for layer, own in self.reading.read.items()}
                    event = replace(event, read=read, read_by=self.reading.chosen_by)
                hooks.observe_cache(event)


def _asks(stage: Stage[Any], step: int) -> bool:
    return step == 0 or (stage.decode_every > 0 and step % stage.decode_every == 0)

"""One pass through the text decoder under a policy: what crosses its boundaries, and what watches it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dropflow.engine.decoder.decide import (
    BoundaryState,
    Decision,
    cache_views,
    decide_cache,
    decide_keeps,
    decide_window,
)
from dropflow.engine.decoder.layer_arguments import LayerArguments
from dropflow.engine.decoder.probe import Arguments, LayerProbe, hidden_of, with_hidden
from dropflow.engine.decoder.record import CallRecord
from dropflow.engine.decoder.weights import with_positional_mask
from dropflow.engine.model.attention import QueryKey, row_attention
from dropflow.engine.model.tap import tap, uncompiled
from dropflow.engine.tokens.cache import FlowLayer, convert_cache, is_flow_cache
from dropflow.engine.tokens.cache_index import PADDING, PROTECTED
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.positions import EMBEDDINGS
from dropflow.engine.tokens.prompt import Prompt
from dropflow.errors import DecisionError
from dropflow.lifecycle.events import BoundaryEvent, CacheEvent, Eviction
from dropflow.lifecycle.stage import Stage
from dropflow.operators.merging import mean_into

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.policy.plan import Plan


class Run:
    """State of one forward of the text decoder; lives from its pre-hook to its post-hook.

    With a `prompt` (this call brings visual tokens) the policy acts at its boundaries. Without one (decoding, or a
    further turn of text) every token of the call is live, and only masks are fitted to what each layer's cache holds.
    """

    def __init__(
        self,
        plan: Plan,
        backbone: Backbone,
        prompt: Prompt | None,
        embeds: Tensor,
        step: int,
        added: tuple[tuple[Tensor, Tensor], ...] = (),
    ) -> None:
        batch, tokens = embeds.shape[:2]
        self.plan, self.backbone, self.prompt = plan, backbone, prompt
        self.embeds = embeds
        """Raw embeddings (batch, tokens, dim): the state with which injected tokens enter."""
        self.step = step
        """Tokens generated since the last prompt; 0 while a prompt is read."""
        self._added = added
        """What the model adds behind its first layers (see `Backbone.deepstack_residuals`)."""
        self.implementation: str = backbone.text.config._attn_implementation
        self.cache: Any = None
        self.cache_stages = [s for _, s in plan.hooks.implementers("decode_cache") if _asks(s, step)]
        self._tapped: dict[int, tuple[LiveSet, QueryKey]] = {}
        self._taps = {layer for stage in self.cache_stages for layer in stage.taps}
        if prompt is None:
            self._taps |= {layer for stage in self.cache_stages for layer in stage.decode_taps}
        self.record: CallRecord | None = None
        if prompt is not None:
            self._taps |= {layer for stages in plan.prune_at.values() for _, stage in stages for layer in stage.taps}
            decided = decide_window(plan, backbone, prompt)
            self.window, self._window_edge_by = decided.window, decided.by
            if decided.keep_answer_sources:
                self.prompt = prompt = prompt.keeping_answer_sources()
            self._outlive = prompt.answer_sources if decided.keep_answer_sources else None
            self.live_mask = prompt.valid
            image = torch.where(prompt.valid, prompt.image_id + prompt.protected * PROTECTED, PADDING)
            self.record = CallRecord(plan, backbone.decoder_widths, prompt, embeds.element_size())
        else:
            image = torch.full((batch, tokens), -1, device=embeds.device)
        self._fitting = LayerArguments(
            LiveSet.whole(batch, tokens, embeds.device),
            image,
            None if prompt is None else prompt.valid,
            flash="flash" in self.implementation,
            rotary=functools.partial(backbone.rotary, embeds) if plan.policy.positions == "compact" else None,
        )

    @property
    def live(self) -> LiveSet:
        """Tokens of this call that are live in front of the coming layer."""
        return self._fitting.live

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run decoder layer `number` on what is live in front of it."""
        if number == 0:
            self._open_cache(kwargs.get("past_key_values"))
        if self.prompt is not None:
            args, kwargs = self._cross(number, layer, args, kwargs)
        held, fitting = self._held(number), self._fitting
        if self.prompt is None and number not in self._taps and fitting.suits(held, kwargs):
            positions = fitting.positions(held, kwargs)
            return layer(*args, **(kwargs | positions if positions else kwargs))
        keys = fitting.keys(held)
        args, kwargs = fitting.arguments(args, kwargs, held, keys)
        rotary = kwargs.get(EMBEDDINGS)
        if fitting.log_weights is not None:
            args, kwargs = with_positional_mask(layer, args, kwargs)
        if number in self._taps:
            with tap(self.implementation, lambda seen: self._keep_tapped(number, seen, rotary)):
                output = uncompiled(layer)(*args, **kwargs)
        else:
            output = layer(*args, **kwargs)
        if self.prompt is not None and held is not None and held.is_initialized:
            held.set_index(keys)
        return output if number >= len(self._added) else self._with_added(number, output)

    def finish(self) -> None:
        """Ask the cache stages, now that every layer has written its entries, and tell those who watch."""
        hooks, tokens = self.plan.hooks, self.embeds.shape[1]
        told: list[Eviction] | None = [] if hooks.watched("observe_cache") else None
        if (self.cache_stages or told is not None) and is_flow_cache(self.cache):
            decide_cache(self.plan, self.cache_stages, self.cache, self.step, tokens, self._attention_rows, told)
            if self.record is not None and self.cache_stages:
                self.record.held = tuple(layer.full_index().tokens for layer in self.cache.layers)
            if told is not None:
                hooks.observe_cache(CacheEvent(self.step, tuple(told), cache_views(self.cache)))

    def _with_added(self, number: int, hidden: Tensor) -> Tensor:
        """Behind layer `number`: live visual tokens receive what the model itself would add to all of them."""
        where, rows = self._added[number]
        where = where.to(hidden.device)[:, :, None]
        added = hidden.new_zeros(*where.shape[:2], hidden.shape[2]).masked_scatter(where, rows.to(hidden))
        return hidden + (added if self.live.everything else self.live.take(added))

    def _keep_tapped(self, number: int, seen: QueryKey, rotary: Any) -> None:
        self._tapped[number] = (self.live, replace(seen, rotary=rotary))

    def _open_cache(self, cache: Any) -> None:
        if cache is not None and self.prompt is not None and not is_flow_cache(cache):
            convert_cache(cache, self.plan.shape.layers)
        self.cache = cache
        if self.record is not None and cache is not None:
            self.record.past = tuple(0 if held.keys is None else held.keys.shape[-2] for held in cache.layers)
            self.record.seen = cache.get_seq_length()

    def _held(self, number: int) -> FlowLayer | None:
        held: FlowLayer | None = None if self.cache is None else self.cache.layers[number]
        return held

    def _cross(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Apply what the policy says at the boundary in front of layer `number` to the hidden states."""
        prompt, window = self.prompt, self.window
        stages = self.plan.prune_at.get(number, ()) if window.entry <= number < window.exit else ()
        at_window_edge = number in (0, window.entry, window.exit)
        if prompt is None or not (at_window_edge or stages):
            return args, kwargs
        hidden = hidden_of(args, kwargs)
        if at_window_edge:
            live_mask = prompt.present if window.entry <= number < window.exit else self._outside(prompt, number)
            hidden = self._move(live_mask, hidden, self.embeds if number == window.entry > 0 else None)
        shown, decision = self.live, Decision(self.live_mask)
        merged: Tensor | None = None
        if stages:
            probe = self._probe(number, layer, hidden, args, kwargs)
            training = torch.is_grad_enabled() and self.backbone.text.training
            norm = self.backbone.final_norm
            standing = BoundaryState(number, window, self.live, self.live_mask, hidden, norm, self.embeds, training)
            decision = decide_keeps(
                self.plan,
                prompt,
                standing,
                lambda asked, rows: self._attention_rows(asked, rows, probe),
                self._seen_now,
            )
            if decision.merge_into is not None:
                hidden, merged = mean_into(hidden, decision.merge_into), shown.to_tokens(decision.merge_into)
            hidden = self._move(decision.live_mask, hidden, None)
            self._fitting = self._fitting.weighed(decision.log_weights)
        if self.record is not None:
            self.record.add(number, self.live_mask, merged)
        if self.plan.hooks.watched("observe"):
            self._tell(number, tuple(name for name, _ in stages), shown, prompt, decision, merged)
        return with_hidden(hidden, args, kwargs)

    def _outside(self, prompt: Prompt, number: int) -> Tensor:
        """Tokens that are live outside the window: text, and behind the exit what a stage lets outlive it."""
        if self._outlive is None or number < self.window.exit:
            return prompt.text
        return prompt.text | (self._outlive & prompt.present)

    def _tell(
        self,
        number: int,
        names: tuple[str, ...],
        shown: LiveSet,
        prompt: Prompt,
        decision: Decision,
        merged: Tensor | None,
    ) -> None:
        """Tell those who watch what was applied; `shown` are the slots that the stages saw."""
        event = BoundaryEvent(
            boundary=number,
            stages=names,
            window_edge_by=self._window_edge_by.get(number, ()),
            window=self.window,
            prompt=prompt,
            live=self.live_mask,
            image_id=prompt.image_id,
            index=shown.index,
            scores=decision.scores,
            keeps=decision.keeps,
            merged_into=merged,
            merged_by=decision.merged_by,
        )
        self.plan.hooks.observe(event)

    def _probe(
        self, number: int, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LayerProbe:
        held, fitting = self._held(number), self._fitting
        return LayerProbe(
            number,
            layer,
            hidden,
            lambda: fitting.arguments(args, kwargs, held, fitting.keys(held)),
            implementation=self.implementation,
            projections=self.backbone.projections(layer),
            past=held.keys if held is not None and held.length else None,
        )

    def _attention_rows(self, layer: int, rows: Tensor, probe: LayerProbe | None = None) -> Tensor:
        """Attention rows of a tapped layer, or by `probe` of the layer in front of which the run stands."""
        if probe is not None and layer == probe.number:
            return probe.rows(rows)
        return row_attention(self._seen_now(layer), rows)

    def _seen_now(self, layer: int) -> QueryKey:
        """q and k of a tapped layer, if the tokens it saw are those that are live now."""
        if layer not in self._tapped:
            raise DecisionError(f"layer {layer}: list it in the stage's `taps` to read its attention after it ran")
        live, seen = self._tapped[layer]
        if live is not self.live:
            raise DecisionError(f"layer {layer}: the live set has changed since its attention ran")
        return seen

    def _move(self, live_mask: Tensor, hidden: Tensor, raw: Tensor | None) -> Tensor:
        """Make `live_mask` the live set and bring the hidden states along; with `raw`, tokens may enter."""
        if torch.equal(live_mask, self.live_mask):
            return hidden  # padding, too, stays where it is until a token really goes
        live = LiveSet.of(live_mask)
        hidden = live.restrict(self.live, hidden, raw)
        self._fitting, self.live_mask = self._fitting.moved(live, live_mask), live_mask
        return hidden


def _asks(stage: Stage[Any], step: int) -> bool:
    return step == 0 or (stage.decode_every > 0 and step % stage.decode_every == 0)

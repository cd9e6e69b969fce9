"""A call with visual tokens: what crosses each boundary of the decoder, and what observers see of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dropflow.engine.decoder.awaited import Awaited
from dropflow.engine.decoder.cache_stages import CacheStages
from dropflow.engine.decoder.decide_keeps import BoundaryState, Decision, decide_keeps
from dropflow.engine.decoder.decide_window import WindowDecision, decide_window
from dropflow.engine.decoder.keeps import Replayed
from dropflow.engine.decoder.layer_arguments import LayerArguments
from dropflow.engine.decoder.parked import Parking, park
from dropflow.engine.decoder.places import check_places, first_drop
from dropflow.engine.decoder.probe import LayerProbe
from dropflow.engine.decoder.record import CallRecord
from dropflow.engine.decoder.recurrent import run_without_attention
from dropflow.engine.decoder.shared_keys import SharedKeys
from dropflow.engine.decoder.site import Site
from dropflow.engine.decoder.tapped_layer import TappedLayer
from dropflow.engine.decoder.weights import with_positional_mask
from dropflow.engine.decoder.windows import check_prompt_windows
from dropflow.engine.model.arguments import Arguments, cache_in, hidden_of, parameters_of, with_hidden
from dropflow.engine.model.attention import QueryKey
from dropflow.engine.tokens.cache import convert_cache, first_held, seen_by
from dropflow.engine.tokens.cache_index import PADDING, PROTECTED, KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer
from dropflow.engine.tokens.host import Extent, read
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.prompt import Prompt
from dropflow.engine.tokens.restricting import check_arguments
from dropflow.engine.tokens.shared_entries import FlowShared
from dropflow.errors import DecisionError, UnsupportedCall
from dropflow.lifecycle.asked_rows import check_layer
from dropflow.lifecycle.events import BoundaryEvent
from dropflow.lifecycle.stage import Window
from dropflow.operators.merging import mean_into

if TYPE_CHECKING:
    from dropflow.policy.plan import Plan


class PromptRun:
    """State of one forward of the text decoder with visual tokens, at whose boundaries the policy acts."""

    def __init__(
        self,
        site: Site,
        prompt: Prompt,
        embeds: Tensor,
        residuals: tuple[tuple[Tensor, Tensor], ...] = (),
        real: Tensor | None = None,
        replayed: Replayed | None = None,
        awaited: Awaited | None = None,
    ) -> None:
        """`embeds` (batch, tokens, dim) are the input embeddings of the decoder.

        `residuals` are what the model adds after its first layers (see `Backbone.deepstack_residuals`). `real` is false
        for padding in earlier calls. With `replayed`, its keeps take the place of the stages' decisions. With
        `awaited`, only what concerns text is right in these until vision enters; then the arrival takes their place.
        """
        batch, tokens = embeds.shape[:2]
        plan, backbone = site.plan, site.backbone
        self._site, self._embeds, self._residuals, self._real = site, embeds, residuals, real
        self._caches = CacheStages(site, 0, tokens)
        self._shared = SharedKeys(site)
        self._entering = embeds
        """What the first layer receives, with which tokens enter late."""
        cache_taps = {layer for stage in self._caches.stages for layer in stage.taps}
        self._taps = cache_taps | set(plan.ranking_taps)
        self._states: dict[int, tuple[LiveSet, Tensor]] = {}
        """What layers whose states are read returned, and on which tokens they ran."""
        self._notes: dict[str, Tensor] = {}
        """What stages noted about the samples, by stage name."""
        self._replayed = replayed
        parks = plan.policy.recall and not plan.uniform and not site.training
        self._parking = Parking(site, frozenset(self._taps)) if parks else None
        self._before: tuple[int, int] = 0, 0
        """Tokens and images that the cache had seen before the call."""
        self._awaited = awaited
        self._untold: list[Callable[[], None]] = []
        """What observers are told once the features have arrived."""
        whole = prompt
        decided = (
            decide_window(plan, backbone, prompt.text, lambda: whole if awaited is None else awaited.get().prompt)
            if replayed is None
            else _replayed_window(replayed, plan)
        )
        self.window, self._window_edge_by = decided.window, decided.by
        self._spares_sources = decided.keep_answer_sources
        prompt = self._take(prompt)
        self.live_mask, self._count = prompt.valid, prompt.extents["valid"].total
        self.record: CallRecord | None = CallRecord(prompt.valid, prompt, embeds.element_size())
        self.losses: list[Tensor] = []
        """Terms that stages add to the loss of training."""
        self._arguments = LayerArguments(
            site,
            embeds,
            LiveSet.whole(batch, tokens, embeds.device),
            _image_id(prompt),
            prompt.valid,
            len(prompt.image_sizes),
        )

    def _take(self, prompt: Prompt) -> Prompt:
        """Make `prompt` that of the run, with its answer sources protected if the exit spares them."""
        self.prompt = prompt.keeping_answer_sources() if self._spares_sources else prompt
        self._outlive = self.prompt.answer_sources & self.prompt.present if self._spares_sources else None
        return self.prompt

    def _arrive(self, number: int) -> None:
        """Wait for features that are still being encoded, and take what follows from them, before layer `number`."""
        if self._awaited is None:
            return
        arrival = self._awaited.get()
        before, prompt = len(self.prompt.image_sizes), self._take(arrival.prompt)
        images = len(prompt.image_sizes)
        ran = [held.index for layer, held in self._caches.held.items() if layer < number and held.index is not None]
        for index in {id(index): index for index in ran}.values():
            index.images += images - before  # they hold no visual tokens, but the numbering goes on
        self._embeds = self._entering = arrival.embeds
        self._residuals = arrival.residuals
        image_id = _image_id(prompt)
        self._arguments = replace(self._arguments, embeds=arrival.embeds, image_id=image_id, images=images)
        if self.record is not None:
            self.record.prompt = prompt
        self._awaited = None
        while self._untold:
            self._untold.pop(0)()

    @property
    def live(self) -> LiveSet:
        """Tokens of this call that are live before the next layer."""
        return self._arguments.live

    @property
    def whole(self) -> bool:
        """Whether every token of the call is live after the last layer."""
        return self.live.everything

    @property
    def drops(self) -> bool:
        """Whether some layer may hold fewer tokens than the call has."""
        return not self._site.plan.uniform or self.prompt.extents["present"] != self.prompt.extents["valid"]

    def leaves(self, number: int) -> bool:  # noqa: ARG002
        """Always false: the policy or an observer may act before any layer."""
        return False

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run decoder layer `number` on the tokens that are live before it."""
        if number == 0:
            self._begin(layer, args, kwargs)
        if self._parking is not None:
            self._parking.see(number, layer, args, kwargs)
        args, kwargs = self._cross(number, layer, args, kwargs)
        output = self._run(number, layer, args, kwargs)
        output = output if number >= len(self._residuals) else self._with_residual(number, output)
        if number in self._site.plan.states_taps:
            states = output[0] if isinstance(output, tuple) else output
            self._states[number] = self._returned_by(number, self._site.backbone.seen_states(states))
        return output

    def _run(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._site.plan.shape.attends(number):
            live, continues = self._count, self._caches.has_state(number)
            return run_without_attention(number, layer, args, kwargs, self._arguments, live=live, continues=continues)
        held, arguments = self._caches.held.get(number), self._arguments
        keys = arguments.keys(held)
        given, (args, kwargs) = (args, kwargs), self._fitted(number, layer, args, kwargs, keys)
        if arguments.log_weights is not None:
            args, kwargs = with_positional_mask(layer, args, kwargs)
        if number in self._taps:
            output = self._tap(number, layer, given, (args, kwargs), keys)
        else:
            output = layer(*args, **kwargs)
        self._shared.note_made(number, arguments)
        if isinstance(held, FlowShared):
            self._see_shared(number, held)
        elif held is not None and held.is_initialized:
            self._hold(held, keys)
        return output

    def _see_shared(self, number: int, held: FlowShared) -> None:
        """Record what a layer that shares keys sees of them after it ran."""
        self._shared.note_seen(number, held, self.live, self.live_mask)

    def _hold(self, held: FlowLayer | UniformLayer, keys: KeyIndex) -> None:
        """Record what a layer's cache holds after it ran."""
        held.set_index(keys)

    def _tap(self, number: int, layer: nn.Module, given: Arguments, fitted: Arguments, keys: KeyIndex) -> Any:  # noqa: ARG002
        """Run a tapped layer on its `fitted` arguments; `given` are the model's, `keys` what its cache will hold."""
        values = number in self._site.plan.states_taps
        return self._caches.tap(number, layer, *fitted, self.live, values=values)

    def _returned_by(self, number: int, states: Tensor) -> tuple[LiveSet, Tensor]:  # noqa: ARG002
        """What layer `number` returned, and the tokens it ran on."""
        return self.live, states

    def _fitted(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keys: KeyIndex
    ) -> Arguments:
        """The layer's arguments, adjusted to the live tokens, its cache, which will hold `keys`, and shared keys."""
        kwargs = self._shared.restricted(number, kwargs, self.live)
        return self._arguments.arguments(layer, args, kwargs, self._caches.held.get(number), keys)

    def expanded(self, hidden: Tensor) -> Tensor:
        """The states after the last layer, of all tokens of the call: the last live one where a token is not live."""
        return self.live.expand(hidden)

    def finish(self) -> None:
        """Ask the cache stages, and park what later questions may recall."""
        self._arrive(self._site.plan.shape.layers)
        self._caches.finish()
        cache = self._caches.cache
        if self._parking is None or cache is None:
            return
        prompt, seen = self.prompt, self._caches.seen
        found = self._parking.result(
            prompt, self._embeds, self._residuals, *self._before, seen, self._states, self.window
        )
        if found is not None:
            park(cache, found)

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the arguments of the first layer before anything has run."""
        plan, known = self._site.plan, self._site.backbone.token_arguments
        _, cache = cache_in(kwargs)
        self._entering = hidden_of(args, kwargs)  # Granite scales the embeddings, Gemma 3n makes streams of them
        if self._awaited is not None and self._entering is not self._embeds:
            raise UnsupportedCall(
                "overlap: the text decoder changes its input embeddings before the first layer, and could not change "
                "those of images that are encoded meanwhile; attach the policy without `overlap`"
            )
        if self.drops:
            given = dict(zip(parameters_of(layer), args, strict=False)) | kwargs
            check_arguments(given, self.live, known)
            length = seen_by(cache) + self.live.total
            check_places(self._site.backbone, first_drop(plan, self.prompt, self.window), length)
            check_prompt_windows(self._site, self.prompt, self.window, length)
        if cache is not None and (self.drops or plan.hooks.watched("observe_cache")):
            convert_cache(cache, plan.shape, uniform=plan.uniform, written_by=plan.identity, real=self._real)
        self._caches.begin(cache)
        if self._parking is not None and cache is not None:
            index = first_held(cache).index
            self._before = seen_by(cache), 0 if index is None else index.images

    def _with_residual(self, number: int, hidden: Tensor) -> Tensor:
        """Add to live visual tokens what the model itself adds to all visual tokens after layer `number`."""
        where, rows = self._residuals[number]
        where = where.to(hidden.device)[:, :, None]
        added = hidden.new_zeros(*where.shape[:2], hidden.shape[2]).masked_scatter(where, rows.to(hidden))
        return hidden + (added if self.live.everything else self.live.take(added))

    def _cross(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Apply the policy's decisions at the boundary before layer `number` to the hidden states."""
        if number in (self.window.entry, self.window.exit):
            self._arrive(number)
        window, plan = self.window, self._site.plan
        inside = window.entry <= number < window.exit
        replayed = self._replayed
        stages = plan.prune_at.get(number, ()) if inside and replayed is None else ()
        decides = bool(stages) if replayed is None else inside and number in replayed.boundaries
        at_window_edge = number in (0, window.entry, window.exit)
        if not (at_window_edge or decides):
            return args, kwargs
        hidden = self._at_window_edge(number, hidden_of(args, kwargs))
        if self._parking is not None and number == self._parking.boundary:
            self._parking.park(hidden, self.live, self.live_mask, self.prompt)
        shown, shown_mask, decision = self.live, self.live_mask, Decision(self.live_mask)
        merged: Tensor | None = None
        if decides:
            if replayed is None:
                decision = self._decide(number, layer, hidden, args, kwargs)
                self.losses += decision.losses
            else:
                decision = Decision(replayed.live_mask(shown_mask, number), merge_into=replayed.merged(number, shown))
            if decision.merge_into is not None:
                hidden = _merged(hidden, decision.merge_into)
                merged = shown.to_tokens(decision.merge_into.to(shown.index.device))
            hidden = self._move(decision.live_mask, hidden, None, None, decision)
            self._arguments = self._arguments.weighed(decision.log_weights)
            self._notes |= decision.notes
        if self.record is not None:
            self.record.add(number, self.live_mask, merged)
        if plan.hooks.watched("observe"):
            names = tuple(name for name, _ in stages)
            tell = partial(self._tell, number, names, shown, decision, merged, self.live_mask)
            if self._awaited is None:
                tell()
            else:
                self._untold.append(tell)
        return with_hidden(hidden, args, kwargs)

    def _at_window_edge(self, number: int, hidden: Tensor) -> Tensor:
        """The hidden states once vision has entered or left at this boundary, if it does."""
        prompt, window = self.prompt, self.window
        if number not in (0, window.entry, window.exit):
            return hidden
        if window.entry <= number < window.exit:
            raw = self._entering if number == window.entry > 0 else None
            return self._move(prompt.present, hidden, raw, prompt.extents["present"])
        if self._outlive is None or number < window.exit:
            return self._move(prompt.text, hidden, None, prompt.extents["text"])
        return self._move(prompt.text | self._outlive, hidden, None)

    def _decide(
        self, number: int, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Decision:
        site, arguments = self._site, self._arguments
        probe = self._probe(number, layer, hidden, args, kwargs) if site.plan.shape.attends(number) else None

        def rows(asked: int, slots: Tensor) -> Tensor:
            found = None if probe is None or asked != number else probe.rows(slots)
            return (self._tapped(asked).of_slots(slots, self.live) if found is None else found).to(hidden.device)

        def tapped(asked: int) -> QueryKey:
            return self._tapped(asked).on(self.live).whole().to(hidden.device)

        def returned(asked: int) -> Tensor:
            return self._returned(asked).to(hidden.device)

        state = BoundaryState(
            number,
            self.window,
            self.live,
            self.live_mask,
            site.backbone.seen_states(hidden),
            site.backbone.final_norm,
            self._embeds,
            site.training,
            arguments.log_weights is not None,
            self._notes,
            returned,
        )
        return decide_keeps(site.plan, site.trained, self.prompt, state, rows, tapped)

    def _probe(
        self, number: int, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LayerProbe:
        site, held = self._site, self._caches.held.get(number)
        return LayerProbe(
            number,
            layer,
            hidden,
            lambda: self._fitted(number, layer, args, kwargs, self._arguments.keys(held)),
            implementation=site.implementation,
            projections=site.backbone.projections(layer),
            past=self._caches.past(number),
            sharded=site.sharded,
            shadows=site.shadows,
        )

    def _tapped(self, layer: int) -> TappedLayer:
        """The tapped layer whose attention stands for that of `layer`; it ran on all tokens that are live now."""
        check_layer(layer)
        ranks_by = self._site.plan.shape.ranks_by(layer)
        if ranks_by is None or ranks_by < self.window.entry:
            raise DecisionError(
                f"layer {layer}: ran before vision entered at boundary {self.window.entry}; read a layer from there on"
                if ranks_by == layer
                else f"layer {layer}: has no attention, nor has any layer since vision entered at boundary "
                f"{self.window.entry}; rank after the first layer that has"
            )
        return self._caches.seen(ranks_by)

    def _returned(self, layer: int) -> Tensor:
        """States that a layer returned, for the tokens that are live now."""
        if layer not in self._states or layer < self.window.entry:
            raise DecisionError(
                f"states of layer {layer}: list the layer in `taps` and let `reads_states` be true; vision took part "
                f"from layer {self.window.entry} on"
            )
        then, states = self._states[layer]
        return states if then is self.live else self.live.restrict(then, states, None)

    def _move(
        self,
        live_mask: Tensor,
        hidden: Tensor,
        raw: Tensor | None,
        extent: Extent | None = None,
        decision: Decision | None = None,
    ) -> Tensor:
        """Make `live_mask` the live set and move the hidden states to it; with `raw`, tokens may enter.

        One host synchronisation where the `extent` of the mask is not known. Raises the decision's faults.
        """
        if extent is None:
            faults = () if decision is None else decision.faults
            counts, blamed = read(
                live_mask.sum(1), torch.stack([wrong for wrong, _ in faults]) if faults else live_mask.new_zeros(0)
            )
            for wrong, (_, error) in zip(blamed, faults, strict=True):
                if wrong:
                    raise error
            extent = Extent.of(counts)
        if extent.total == self._count:  # one set contains the other, so equal counts mean equal sets
            return hidden  # padding also stays in place until a token is dropped
        if decision is not None and self._site.plan.uniform:
            raise DecisionError(
                "a stage forecasts that every token stays, but has dropped some; correct its `forecast`, which "
                "determines the kind of cache"
            )
        live = LiveSet.of(live_mask, extent)
        hidden = live.restrict(self.live, hidden, raw)
        self._arguments, self.live_mask = self._arguments.moved(live, live_mask), live_mask
        self._count = extent.total
        return hidden

    def _tell(
        self,
        number: int,
        names: tuple[str, ...],
        shown: LiveSet,
        decision: Decision,
        merged: Tensor | None,
        live_mask: Tensor | None = None,
    ) -> None:
        """Notify observers of what was applied; `shown` are the slots that the stages saw, `live_mask` the live tokens
        where these are more than the layers run on."""
        event = BoundaryEvent(
            boundary=number,
            stages=names,
            window_edge_by=self._window_edge_by.get(number, ()),
            window=self.window,
            prompt=self.prompt,
            live=self.live_mask if live_mask is None else live_mask,
            image_id=self.prompt.image_id,
            index=shown.index,
            scores=decision.scores,
            keeps=decision.keeps,
            merged_into=merged,
            merged_by=decision.merged_by,
            notes=decision.notes,
        )
        self._site.plan.hooks.observe(event)


def _image_id(prompt: Prompt) -> Tensor:
    """Image number of each token, encoded as in `KeyIndex`."""
    return torch.where(prompt.valid, prompt.image_id + prompt.protected * PROTECTED, PADDING)


def _replayed_window(replayed: Replayed, plan: Plan) -> WindowDecision:
    """A window that is open to the end: what has left it goes as the keeps say."""
    return WindowDecision(Window(replayed.entry, plan.shape.layers), False, {})


def _merged(hidden: Tensor, into: Tensor) -> Tensor:
    """Hidden states (*streams, batch, slots, dim) with the mean of those merged at the slots in `into`."""
    return mean_into(hidden, into) if hidden.dim() == 3 else torch.stack([mean_into(one, into) for one in hidden])

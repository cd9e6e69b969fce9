"""The two passes of a prefix through the text decoder: one keeps its tokens, one begins with what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dropflow.engine.decoder.decide_keeps import Decision
from dropflow.engine.decoder.layer_arguments import Once
from dropflow.engine.decoder.places import check_places
from dropflow.engine.decoder.prompt_run import PromptRun
from dropflow.engine.decoder.recurrent import run_without_attention
from dropflow.engine.decoder.site import Site
from dropflow.engine.decoder.tapped_layer import TappedLayer
from dropflow.engine.model.arguments import Arguments, cache_in, hidden_of, parameters_of, with_hidden
from dropflow.engine.tokens.ahead import Ahead, open_ahead, placed
from dropflow.engine.tokens.cache import flow_layers
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import Indexed
from dropflow.engine.tokens.host import Extent, read
from dropflow.engine.tokens.live_set import LiveSet, picked
from dropflow.engine.tokens.masks import last_seen
from dropflow.engine.tokens.prompt import Prompt
from dropflow.engine.tokens.shared_entries import FlowShared
from dropflow.engine.tokens.states import chosen, copied, has_states
from dropflow.errors import UnsupportedCall, UnsupportedModel


class PrefixKept(BaseException):
    """Ends the forward that makes a prefix once all of it is known; never leaves `Flow.prefix`.

    Not an `Exception`, so that error handling in model code does not swallow it.
    """


@dataclass(eq=False)
class Keeping:
    """What a caller asks of the forward that makes a prefix, and what it found."""

    tokens: int | None
    """Tokens of the prefix; `None` for those up to the last visual one."""
    ids: Tensor
    """Token ids (1, tokens) of the prompt."""
    found: Ahead | None = None


class KeepingRun(PromptRun):
    """The forward of one prompt, up to the first boundary that may depend on its question, that keeps a prefix.

    Layers run on the tokens of the prefix alone.
    """

    def __init__(
        self, site: Site, prompt: Prompt, embeds: Tensor, residuals: Any, keeping: Keeping, positions: Any
    ) -> None:
        """`positions` are the position ids that the model states to its decoder, or `None`."""
        super().__init__(site, prompt, embeds, residuals)
        self._keeping, self._boundary, self._positions = keeping, site.plan.asks_from, positions
        self._once, self._sees_later = Once(), list[bool]()
        ids = keeping.ids.to(embeds.device)
        # some models give tokens beside an image other embeddings than those of their ids, as Ovis 2 to those that
        # enclose it; a question without pixels would not
        table = site.backbone.text.get_input_embeddings()
        known = torch.where(prompt.visual, 0, ids).clamp(max=table.num_embeddings - 1)  # some placeholders have no row
        made = (table(known).to(embeds) != embeds).any(-1) & ~prompt.visual
        place = torch.arange(embeds.shape[1], device=embeds.device)
        (last,) = read(torch.where(prompt.visual | made, place, -1).amax())[0]
        self._made = torch.cat((ids[made], ids.new_tensor(list(site.backbone.enclosing))))
        self._cut = last + 1 if keeping.tokens is None else keeping.tokens
        if not last < self._cut <= embeds.shape[1]:
            raise UnsupportedCall(
                f"prefix: expected a number of tokens from {last + 1}, up to which the prompt has visual ones, to "
                f"{embeds.shape[1]}, its length; got {self._cut}"
            )

    @property
    def drops(self) -> bool:
        """Always true: the cache is to record which tokens its entries hold."""
        return True

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer; ends the forward at the boundary."""
        self._see(number, kwargs.get("attention_mask"))
        output = super().layer(number, layer, args, kwargs)
        if number + 1 == self._boundary == self._site.plan.shape.layers:
            self._keep(None, cache_in(kwargs)[1])
        return output

    def _cross(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if number == self._boundary:
            self._keep(self._at_window_edge(number, hidden_of(args, kwargs)), cache_in(kwargs)[1])
        return super()._cross(number, layer, args, kwargs)

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin(layer, args, kwargs)
        prompt = self.prompt
        own = torch.arange(prompt.valid.shape[1], device=prompt.valid.device) < self._cut
        valid, present, text = (mask & own for mask in (prompt.valid, prompt.present, prompt.text))
        counts = map(Extent.of, read(valid.sum(1), present.sum(1), text.sum(1)))
        extents = {**prompt.extents, **dict(zip(("valid", "present", "text"), counts, strict=True))}
        self.prompt = replace(prompt, valid=valid, present=present, extents=extents)

    def _see(self, number: int, mask: Tensor | None) -> None:
        """Note whether tokens of the prefix see later ones in a layer.

        Refuses where a question might be among these. What the last image sees belongs to the prefix, such as a token
        that ends it.
        """
        tokens = self._embeds.shape[1]
        last = self._once(("seen", mask), lambda: read(last_seen(mask, 1, tokens, self._embeds.device))[0])
        later = any(seen > place for place, seen in enumerate(last[: self._cut]))
        if later and self._site.backbone.bidirectional != "images":
            raise UnsupportedModel(
                "prefix: this model lets tokens see later ones, and its adapter "
                f"{type(self._site.backbone).__name__} does not say that these belong to images "
                "(`Backbone.bidirectional`); ask with the whole prompt instead"
            )
        needed = self._cut
        while max(last[:needed]) >= needed:
            needed = max(last[:needed]) + 1
        if needed > self._cut and (number or self._keeping.tokens is not None):
            raise UnsupportedCall(
                f"prefix: what tokens of images see ends only with token {needed}; pass at least `tokens={needed}`"
            )
        self._cut = needed
        self._sees_later.append(later)

    def _keep(self, hidden: Tensor | None, cache: Any) -> NoReturn:
        count, live, prompt = self._cut, self.live, self.prompt
        own = live.index[0] < count  # one sample without padding: the first slots
        assert self.record is not None
        segments = [(boundary, mask[:, :count].clone()) for boundary, mask in self.record.segments]
        if hidden is not None:
            segments.append((self._boundary, self.live_mask[:, :count].clone()))
        counts = read(*(mask.sum() for _, mask in segments))
        layers = dict(enumerate(cache.layers[: self._boundary]))
        entries = _entries({number: layer for number, layer in layers.items() if isinstance(layer, Indexed)}, count)
        seen = {
            number: _narrowed(entries[producer][2], [live for boundary, live in segments if boundary <= number][-1])
            for number, producer in self._site.plan.shape.producers
            if number < self._boundary
        }
        taps = {number: self._caches.seen(number) for number in self._taps if number < self._boundary}
        self._keeping.found = Ahead(
            ids=self._keeping.ids[0, :count].clone(),  # no view, which would keep the rest alive
            made=self._made,
            boundary=self._boundary,
            window=self.window,
            prompt=_cut(prompt, count),
            embeds=self._embeds[:, :count].clone(),
            entries=entries,
            shared=seen,
            recurrent={number: layer for number, layer in layers.items() if has_states(layer)},
            segments=tuple((boundary, mask, live) for (boundary, mask), (live,) in zip(segments, counts, strict=True)),
            hidden=None if hidden is None else hidden[..., own.to(hidden.device), :],
            queries={number: _first(tap.seen.query, tap.live, count, 2) for number, tap in taps.items()},
            states={number: _first(states, live, count, 1) for number, (live, states) in self._states.items()},
            residuals=tuple((where[:, :count].clone(), rows) for where, rows in self._residuals),
            sees_later=tuple(self._sees_later[: self._boundary]),
            positions=None if self._positions is None else self._positions[..., :count].clone(),
        )
        raise PrefixKept


@dataclass(frozen=True, eq=False)
class _Joined:
    """Tokens of a call, some of them of its prefix."""

    mask: Tensor
    """Boolean (batch, tokens)."""
    live: LiveSet
    count: int

    @classmethod
    def of(cls, mask: Tensor, after: Extent, before: int) -> _Joined:
        """The tokens of `mask`: `after` counts those after the prefix, and `before` those of the prefix."""
        extent = Extent(after.low + before, after.high + before, after.total + len(mask) * before)
        return cls(mask, LiveSet.of(mask, extent), extent.total)


class BegunRun(PromptRun):
    """A call that begins with a prefix: up to its boundary, layers run only on what follows it."""

    def __init__(self, site: Site, ahead: Ahead, first: Tensor, prompt: Prompt, embeds: Tensor, cache: Any) -> None:
        """`first` (batch,) is where the prefix begins in each sample, `prompt` what is known of its tokens."""
        tokens, count = embeds.shape[1], ahead.tokens
        place = torch.arange(tokens, device=first.device)
        within = (place >= first[:, None]) & (place < first[:, None] + count)
        kept = placed(ahead.embeds.to(embeds), first.to(embeds.device), tokens, 0.0)
        embeds = torch.where(within.to(embeds.device)[:, :, None], kept, embeds)
        residuals = tuple(
            (placed(where, first, tokens, False), rows.repeat(len(first), 1)) for where, rows in ahead.residuals
        )
        super().__init__(site, prompt, embeds, residuals)
        if self.window != ahead.window:
            raise UnsupportedCall(
                f"prefix: vision takes part in layers {self.window.entry} to {self.window.exit - 1} for this question, "
                f"and took part in {ahead.window.entry} to {ahead.window.exit - 1} where the prefix was made; ask with "
                "the whole prompt instead"
            )
        self._ahead, self._first, self._within, self._cache = ahead, first, within, cache
        self._after, self._once = prompt.valid & ~within, Once()
        low, high, total = prompt.extents["valid"]
        self._count_after = Extent(low - count, high - count, total - len(first) * count)
        assert self.record is not None
        self.record.ahead = ahead.boundary, within

    @property
    def embeds(self) -> Tensor:
        """Input embeddings of the decoder, with those of the prefix at its tokens."""
        return self._embeds

    @property
    def drops(self) -> bool:
        """Always true: some layers run on fewer tokens than the call has."""
        return True

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer, up to the boundary on what follows the prefix."""
        if number < self._ahead.boundary and self._site.backbone.bidirectional is not None:
            mask, expected = kwargs.get("attention_mask"), self._ahead.sees_later[number]
            self._once(("seen", mask, expected), lambda: self._check_mask(mask, expected))
        return super().layer(number, layer, args, kwargs)

    def _check_mask(self, mask: Tensor | None, expected: bool) -> None:
        """Refuse a mask under which the tokens of the prefix see others than where it was made."""
        batch, tokens = self._within.shape
        place = torch.arange(tokens, device=self._within.device)
        last = last_seen(mask, batch, tokens, place.device)
        end = self._first[:, None] + self._ahead.tokens
        later, beyond = read(((last > place) & self._within).any(1), ((last >= end) & self._within).any(1))
        if any(beyond) or any(bool(one) is not expected for one in later):
            raise UnsupportedCall(
                "attention_mask: tokens of the prefix see others here than where it was made; make it from a prompt "
                "with all that belongs to its images, and pass kinds of tokens as the processor gives them"
            )

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ahead, caches, producers = self._ahead, self._caches, dict(self._site.plan.shape.producers)
        if ahead.boundary:  # up to which layers do not see the tokens of the prefix in the call
            check_places(self._site.backbone, 0, self.prompt.valid.shape[1])
        open_ahead(self._cache, ahead, len(self._first), self._first, producers)
        super()._begin(layer, args, kwargs)
        afresh = [number for number in producers if number >= ahead.boundary]  # these run on the prefix, too
        held = flow_layers(self._cache)
        caches.held = {**caches.held, **{number: FlowShared(held[producers[number]], None, 0) for number in afresh}}

    def _run(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number in self._ahead.recurrent and self.live.valid is not None:
            return self._by_length(number, layer, args, kwargs)
        return super()._run(number, layer, args, kwargs)

    def _by_length(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer that goes on from the state of the prefix on questions of different lengths.

        Padding would decay the state, so the layer runs once for each length, on so many last slots of all samples, of
        which those of this length count.
        """
        hidden, layers, outputs = hidden_of(args, kwargs), self._cache.layers, []
        own = self._once(("lengths",), lambda: self._after.sum(1))
        lengths = self._once(("distinct",), lambda: sorted(set(read(own)[0])))
        begun, found, states = layers[number], torch.zeros_like(hidden), []
        for length in lengths:
            layers[number] = copied(begun)
            live = LiveSet(self.live.index[:, -length:], None, self.live.total)
            output = run_without_attention(
                number,
                layer,
                *with_hidden(hidden[:, -length:], args, kwargs),
                replace(self._arguments, live=live),
                live=self._count,
                continues=True,
            )
            outputs.append(output)
            states.append(layers[number])
            rows = output[0] if isinstance(output, tuple) else output
            found[:, -length:] = torch.where((own == length)[:, None, None].to(rows.device), rows, found[:, -length:])
        layers[number] = chosen(states, [own == length for length in lengths])
        return (found, *outputs[-1][1:]) if isinstance(outputs[-1], tuple) else found

    def _made_ahead(self, number: int) -> int | None:
        """The layer that makes the keys of `number`, if that layer ran without the prefix."""
        producer = self._site.plan.shape.producer(number)
        return producer if producer is not None and producer < self._ahead.boundary else None

    def _fitted(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keys: KeyIndex
    ) -> Arguments:
        producer = self._made_ahead(number)
        if producer is None:
            return super()._fitted(number, layer, args, kwargs, keys)
        held = self._caches.held
        made = held[producer].index
        assert made is not None
        kwargs = self._shared.reordered(number, kwargs, made, keys)
        return self._arguments.arguments(layer, args, kwargs, held[number], keys)

    def _see_shared(self, number: int, held: FlowShared) -> None:
        producer, boundary = self._made_ahead(number), self._ahead.boundary
        if producer is None:
            super()._see_shared(number, held)
            return
        index, joined = held.layer.index, self._joined(producer)
        now = self._joined(number) if number < boundary else None
        mask, count = (self.live_mask, self._count) if now is None else (now.mask, now.count)
        held.layer.shared.pop(number, None)
        if count < joined.count:
            assert index is not None
            held.layer.shared[number] = self._once(
                ("seen", index, mask), lambda: index.narrowed(mask.gather(1, index.logical.to(mask.device)))
            )

    def _cross(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        ahead = self._ahead
        if number > ahead.boundary:
            return super()._cross(number, layer, args, kwargs)
        hidden = hidden_of(args, kwargs)
        if number < ahead.boundary:
            if number == 0:
                hidden = self._move(self._after, hidden, None, self._count_after)
                self._arguments = replace(self._arguments, dropped=None)
            if any(number == boundary for boundary, *_ in ahead.segments):
                self._note(number)
            return with_hidden(hidden, args, kwargs)
        assert ahead.hidden is not None
        joined = self._joined(number)
        # before the first layer every token is there
        hidden = joined.live.restrict(self.live, hidden, self._raw(ahead.hidden, number) if number else None)
        self._arguments = self._arguments.moved(joined.live, joined.mask)
        self.live_mask, self._count = joined.mask, joined.count
        args, kwargs = with_hidden(hidden, args, kwargs)
        return super()._cross(number, layer, args, kwargs)

    def _note(self, number: int) -> None:
        """Record and tell what is live before a layer that runs only on what follows the prefix."""
        assert self.record is not None
        joined = self._joined(number)
        self.record.add(number, joined.mask)
        if self._site.plan.hooks.watched("observe"):
            batch, tokens = joined.mask.shape
            shown = LiveSet.whole(batch, tokens, joined.mask.device)
            self._tell(number, (), shown, Decision(joined.mask), None, joined.mask)

    def _joined(self, number: int) -> _Joined:
        """The tokens that are live before a layer up to the boundary, those of the prefix included."""
        live = self._ahead.live(number)
        made: _Joined = self._once(
            (live,),
            lambda: _Joined.of(
                placed(live, self._first, self._within.shape[1], False) | self._after,
                self._count_after,
                self._ahead.count(number),
            ),
        )
        return made

    def _raw(self, kept: Tensor, number: int) -> Tensor:
        """States of the live tokens of the prefix (*streams, 1, live, dim), at their places among all of the call."""
        if kept.dim() > 3:
            return torch.stack([self._raw(one, number) for one in kept])
        live = self._ahead.live(number)
        whole = kept.new_zeros(1, live.shape[1], kept.shape[2])
        whole = whole.masked_scatter(live[:, :, None].to(kept.device), kept)
        found: Tensor = placed(whole, self._first.to(kept.device), self._within.shape[1], 0.0)
        return found

    def _tap(self, number: int, layer: nn.Module, given: Arguments, fitted: Arguments, keys: KeyIndex) -> Any:
        output = super()._tap(number, layer, given, fitted, keys)
        if number < self._ahead.boundary:
            self._caches.replace_tapped(number, self._whole(number, layer, given, keys))
        return output

    def _whole(self, number: int, layer: nn.Module, given: Arguments, keys: KeyIndex) -> TappedLayer:
        """What a tapped layer would have seen had it run on the prefix, too.

        `given` are the layer's arguments as the model gave them, `keys` what its cache holds after the call.
        """
        seen, joined = self._caches.seen(number).seen, self._joined(number)
        arguments = self._arguments.moved(joined.live, joined.mask)
        args, kwargs = given
        args, kwargs = arguments.arguments(layer, args, kwargs, None, arguments.keys(None))
        fitted = dict(zip(parameters_of(layer), args, strict=False)) | kwargs
        ahead = self._ahead.queries[number].to(seen.query)
        query = torch.cat((ahead.expand(len(seen.query), -1, -1, -1), seen.query), 2)
        order = keys.entries_of(joined.live.index, joined.live.total)
        whole = replace(
            seen,
            query=picked(query, order),
            key=picked(seen.key, order),
            value=None if seen.value is None else picked(seen.value, order),
            mask=fitted.get("attention_mask"),
            rotary=fitted.get("position_embeddings"),
        )
        return TappedLayer(whole, joined.live)

    def _returned_by(self, number: int, states: Tensor) -> tuple[LiveSet, Tensor]:
        if number >= self._ahead.boundary:
            return super()._returned_by(number, states)
        live = self._joined(number).live
        return live, live.restrict(self.live, states, self._raw(self._ahead.states[number], number))


def _cut(prompt: Prompt, count: int) -> Prompt:
    """What is known of the first `count` tokens of a prompt of one sample."""
    per_token = ("image_id", "valid", "present", "protected", "extra", "line", "carried", "tower", "video_id")
    values = ((name, getattr(prompt, name)) for name in per_token)
    cut: dict[str, Any] = {name: None if value is None else value[:, :count].clone() for name, value in values}
    return replace(prompt, **cut)


def _first(states: Tensor, live: LiveSet | None, count: int, dim: int) -> Tensor:
    """States of one sample's live tokens, along `dim`, of which only the first `count` tokens of the call are kept."""
    assert live is not None
    return states.index_select(dim, (live.index[0] < count).nonzero()[:, 0].to(states.device))


def _narrowed(index: KeyIndex, live: Tensor) -> KeyIndex:
    """Those of the entries that hold a `live` token (1, prefix) of one sample."""
    take = live[0, index.logical[0]].nonzero()[:, 0]
    if len(take) == len(index):
        return index
    dropped = None if index.dropped is None else index.dropped + len(index) - len(take)
    return KeyIndex(index.logical[:, take], None, index.image_id[:, take], 0, dropped)


def _entries(layers: Mapping[int, Any], count: int) -> dict[int, tuple[Tensor, Tensor, KeyIndex]]:
    """Keys, values and index of the entries that hold one of the first `count` tokens of one sample, by layer."""
    made: dict[KeyIndex, tuple[Tensor, KeyIndex]] = {}
    found = {}
    for number, layer in layers.items():
        index = layer.full_index()
        if index not in made:
            take = ((index.logical[0] < count) & index.filled[0]).nonzero()[:, 0]
            dropped = None if index.dropped is None else torch.full_like(index.dropped, count - len(take))
            made[index] = take, KeyIndex(index.logical[:, take], None, index.image_id[:, take], 0, dropped)
        take, own = made[index]
        keys, values = (part[:, :, take.to(part.device)] for part in (layer.keys, layer.values))
        found[number] = keys, values, own
    return found

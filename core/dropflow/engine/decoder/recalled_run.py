"""A later turn of a conversation, for which the new question chooses anew among all parked visual tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dropflow.engine.decoder.layer_arguments import ContinuedArguments, Held, Once
from dropflow.engine.decoder.parked import Parked
from dropflow.engine.decoder.prompt_run import PromptRun
from dropflow.engine.decoder.site import Site
from dropflow.engine.decoder.tapped_layer import TappedLayer
from dropflow.engine.model.arguments import Arguments, hidden_of, parameters_of, with_hidden
from dropflow.engine.tokens.cache import first_held, flow_layers, note_padding
from dropflow.engine.tokens.cache_index import PADDING, KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer
from dropflow.engine.tokens.host import Extent, read
from dropflow.engine.tokens.live_set import LiveSet, picked
from dropflow.engine.tokens.masks import without
from dropflow.engine.tokens.prompt import Prompt


class RecalledRun(PromptRun):
    """A text-only call whose tokens, from the parked tokens' boundary on, run together with these.

    The run counts *virtual* tokens: the parked ones, right-aligned, then those of the call. Layers before the boundary
    run on the call's tokens alone, with caches that hold every parked token. At the boundary the parked states join,
    the entries that earlier questions have left of their tokens are gone from later layers, and stages decide as in a
    prompt. Tokens of earlier turns keep the entries that they have.
    """

    whole = False

    def __init__(
        self,
        site: Site,
        parked: Parked,
        embeds: Tensor,
        cache: Any,
        valid: Bool[Tensor, "batch tokens"],
        instruction: tuple[Tensor, Tensor],
        questions: tuple[str, ...] | None,
    ) -> None:
        """`embeds`, `valid` and `instruction` are those of the call's tokens."""
        self._parked, self._cache, self._own = parked, cache, valid
        self._seen = int(cache.get_seq_length())
        self._continued = ContinuedArguments(site, embeds)
        self._once = Once()
        first = self._parked_tokens = parked.logical.shape[1]
        prompt = _prompt(parked, valid, (instruction[0] + first, instruction[1]), questions)
        whole = torch.cat((parked.embeds.to(embeds), embeds), 1)
        visual = torch.nn.functional.pad(parked.valid, (0, valid.shape[1]))
        residuals = tuple(
            (visual, parked.residuals[number][parked.valid.to(embeds.device)])
            if number in parked.residuals
            else (torch.zeros_like(visual), embeds.new_zeros(0, embeds.shape[2]))
            for number in range(max(parked.residuals, default=-1) + 1)
        )
        super().__init__(site, prompt, whole, residuals)
        self.window, self._window_edge_by, self._outlive = parked.window, {}, None
        self.record = None
        self._parking = None
        self._true = torch.cat(
            (parked.logical, self._seen + torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1)), 1
        )
        """Logical index in the conversation of each virtual token."""
        self._take_out()

    @property
    def drops(self) -> bool:
        """Always true: layers run on other tokens than the call's."""
        return True

    def expanded(self, hidden: Tensor) -> Tensor:
        """The states of the call's tokens."""
        return super().expanded(hidden)[:, self._parked_tokens :]

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run decoder layer `number`: before the boundary on the call's tokens, after it with parked ones."""
        boundary = self._site.plan.asks_from
        if number < boundary:
            return self._alone(number, layer, args, kwargs)
        args, kwargs = self._virtual(number, layer, args, kwargs)
        if number == boundary:
            hidden = hidden_of(args, kwargs)
            args, kwargs = with_hidden(torch.cat((self._parked.hidden.to(hidden), hidden), 1), args, kwargs)
        return super().layer(number, layer, args, kwargs)

    def _begin(self, *_: Any) -> None:
        """Nothing is left to do: the cache is one of an earlier prompt."""

    def _take_out(self) -> None:
        """Take what earlier questions have left of the parked tokens out of the layers from the boundary on."""
        self._caches.begin(self._cache)
        first = first_held(self._cache).full_index()
        self._earlier = torch.zeros(len(self._own), self._seen + 1, dtype=torch.bool, device=first.logical.device)
        shown = first.filled & (first.image_id != PADDING)
        self._earlier.scatter_(1, torch.where(shown, first.logical, self._seen), value=True)
        made: dict[KeyIndex, tuple[LiveSet, KeyIndex] | None] = {}
        for number, held in flow_layers(self._cache).items():
            assert isinstance(held, FlowLayer)
            if number < self._site.plan.asks_from:
                continue
            index = held.full_index()
            if index not in made:
                stays = (index.image_id < 0) & index.filled
                extent = Extent.read(stays)
                gone = not (extent.low == extent.high == len(index))
                kept = LiveSet.of(stays, extent)
                made[index] = (kept, index.compacted(kept)) if gone else None
            change = made[index]
            if change is not None:
                held.evict(*change)

    # Layers before the boundary

    def _alone(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        held = self._caches.held[number]
        fitted = self._continued.arguments(kwargs, held, number)
        if number not in self._taps:
            return layer(*args, **fitted)
        index = held.full_index()
        values = number in self._site.plan.states_taps
        output = self._caches.tap(number, layer, args, fitted, values=values)
        self._caches.replace_tapped(number, self._with_parked(number, layer, args, kwargs, index))
        if values:
            states = self._site.backbone.seen_states(output[0] if isinstance(output, tuple) else output)
            whole = torch.cat((self._parked.states[number].to(states), states), 1)
            self._states[number] = self.live, whole
        return output

    def _with_parked(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: KeyIndex
    ) -> TappedLayer:
        """What a tapped layer saw, with rows of the parked tokens; `index` is what its cache held before."""
        seen = self._caches.seen(number).seen
        given = self._virtual(number, layer, args, kwargs)[1]
        tokens, entries = self._own.shape[1], len(index)
        others = self._once(("others", index), lambda: LiveSet.of((index.image_id < 0) & index.filled))
        place = index.entries_of(self._parked.logical, self._seen)
        own = torch.arange(entries, entries + tokens, device=place.device).expand(len(place), -1)
        order = torch.cat((others.index, place, own), 1)
        mask = self._mask(kwargs.get("attention_mask"))
        virtual = torch.arange(self._seen, self._seen + self._rows, device=place.device).expand(len(place), -1)
        columns = torch.cat((others.take(index.logical), virtual), 1)
        mask = mask.gather(3, columns[:, None, None].expand(-1, *mask.shape[1:3], -1).to(mask.device))
        if others.valid is not None:
            shown = torch.nn.functional.pad(others.valid, (0, self._rows), value=True)
            mask = without(mask, shown[:, None, None].to(mask.device))
        query = torch.cat((self._parked.queries[number].to(seen.query), seen.query), 2)
        whole = replace(
            seen,
            query=query,
            key=picked(seen.key, order),
            value=None if seen.value is None else picked(seen.value, order),
            mask=mask,
            rotary=given.get("position_embeddings"),
        )
        return TappedLayer(whole, self.live)

    # Layers from the boundary on

    @property
    def _rows(self) -> int:
        """Number of virtual tokens."""
        return self._true.shape[1]

    def _virtual(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """A layer's arguments for all virtual tokens."""
        parked, names = self._parked.arguments[number], parameters_of(layer)
        mask = self._mask(kwargs.get("attention_mask"))

        def joined(name: str, value: Any) -> Any:
            if name == "attention_mask":
                return mask
            if name not in parked or value is None:
                return value
            key = tuple(value) if isinstance(value, list) else value
            return self._once(("value", name, key), lambda: self._with_own(name, parked[name], value))

        args = (*args[:1], *(joined(*one) for one in zip(names[1:], args[1:], strict=False)))
        return args, {**{name: joined(name, value) for name, value in kwargs.items()}, "attention_mask": mask}

    def _with_own(self, name: str, parked: Any, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._with_own(name, *pair) for pair in zip(parked, value, strict=True))
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        dim = self._parked.token_dims[name]
        parked = parked.to(value)
        value = value.expand(*parked.shape[: parked.dim() + dim], *value.shape[value.dim() + dim :])
        return torch.cat((parked, value), dim)

    def _mask(self, mask: Tensor | None) -> Tensor:
        """The mask (batch, heads, virtual tokens, all tokens) from the model's for the tokens of the call."""
        found: Tensor = self._once(("mask", mask), lambda: self._virtual_mask(mask))
        return found

    def _virtual_mask(self, given: Tensor | None) -> Tensor:
        parked, device = self._parked, self._true.device
        batch, tokens = self._own.shape
        past, whole = torch.arange(self._seen, device=device), torch.arange(self._seen + tokens, device=device)
        model = (whole <= whole[self._seen :, None])[None, None] if given is None else given.to(device)
        mask = model.expand(batch, *model.shape[1:])[..., : self._seen + tokens]
        place = parked.logical[:, None, None].expand(-1, *mask.shape[1:3], -1)
        seen = without(mask.gather(3, place), parked.valid[:, None, None])
        own = torch.cat((mask[..., : self._seen], seen, mask[..., self._seen :]), 3)
        before = (past <= parked.logical[:, :, None]) & self._earlier[:, None, : self._seen]
        count = self._parked_tokens
        among = torch.ones(count, count, dtype=torch.bool, device=device).tril() & parked.valid[:, None, :]
        among = among | torch.eye(count, dtype=torch.bool, device=device)
        rows = torch.cat((before, among, before.new_zeros(batch, count, tokens)), 2)[:, None]
        if mask.dtype != torch.bool:
            rows = without(torch.zeros_like(rows, dtype=mask.dtype), rows)
        return torch.cat((rows.expand(-1, mask.shape[1], -1, -1), own), 2)

    def _hold(self, held: Held, keys: KeyIndex) -> None:
        """Record what a layer's cache holds, in the order of the conversation; `keys` counts virtual tokens."""
        assert isinstance(held, FlowLayer)
        live = self.live
        order, index = self._once(("held", keys), lambda: self._held(keys, live))
        held.reorder(order, index)

    def _held(self, keys: KeyIndex, live: LiveSet) -> tuple[Tensor, KeyIndex]:
        """The order of a layer's entries, and the index that they then have."""
        past = len(keys) - live.slots
        parked, count = self._parked, self._own.shape[1]
        own = torch.where(self._own, -1, PADDING)
        image = torch.cat((parked.held_as.to(own.device), own), 1)
        logical = torch.cat((keys.logical[:, :past], live.take(self._true)), 1)
        image = torch.cat((keys.image_id[:, :past], live.take(image)), 1)
        valid = keys.filled
        if live.everything:  # padding among the parked tokens has stayed in place
            shown = torch.cat((parked.valid, torch.ones_like(self._own)), 1)
            valid = valid & torch.cat((torch.ones_like(valid[:, :past]), shown), 1)
        extent = Extent.read(valid)
        order = torch.where(valid, logical, -1).argsort(dim=1, stable=True)[:, len(keys) - extent.high :]
        taken = parked.valid.sum(1)
        index = KeyIndex(
            logical.gather(1, order),
            None if extent.low == extent.high else valid.gather(1, order),
            image.gather(1, order),
            self._seen + count,
            -taken if keys.dropped is None else keys.dropped - taken,
            keys.images - len(self.prompt.image_sizes),
        )
        return order, index

    def _tell(self, *_: Any) -> None:
        """Observers are told nothing: the tokens of this call are not those of a prompt."""

    def finish(self) -> None:
        """Note padding in the layers that have no record of it yet."""
        note_padding(self._cache, self._own)
        self._caches.finish()


def _prompt(
    parked: Parked, valid: Tensor, instruction: tuple[Tensor, Tensor], questions: tuple[str, ...] | None
) -> Prompt:
    """What is known of the virtual tokens; one host synchronisation."""
    tokens, batch = valid.shape[1], len(valid)
    rows = torch.arange(batch, device=valid.device)[:, None]

    def padded(values: Tensor | None, fill: float) -> Any:
        if values is None:
            return None
        more = values.new_full((batch, tokens, *values.shape[2:]), fill)
        return torch.cat((values, more), 1)

    def numbered(number: Tensor | None) -> Any:
        return None if number is None else padded(torch.where(number < 0, -1, number + rows * parked.images), -1)

    image = numbered(parked.image_id)
    whole = torch.cat((parked.valid, valid), 1)
    text = torch.nn.functional.pad(valid, (parked.logical.shape[1], 0))
    extra = padded(parked.extra, False)
    scored = image if extra is None else image.masked_fill(extra, -1)
    counts = torch.zeros(batch * parked.images + 1, dtype=torch.long, device=valid.device)
    counts.index_add_(0, scored.flatten() + 1, whole.flatten().long())
    sizes, *per_sample = read(counts, *(mask.sum(1) for mask in (whole, whole, text, text)))
    return Prompt(
        image_id=image,
        valid=whole,
        present=whole,
        protected=padded(parked.protected, False),
        instruction_slots=instruction[0],
        instruction_valid=instruction[1],
        image_sizes=tuple(sizes[1:]),
        patches=counts[1:],
        extents=dict(zip(("valid", "present", "text", "after"), map(Extent.of, per_sample), strict=True)),
        extra=extra,
        line=padded(parked.line, 0),
        lines=parked.lines,
        carried=padded(parked.carried, 0.0),
        tower=padded(parked.tower, 0.0),
        video_id=numbered(parked.video_id),
        videos=batch * parked.images,
        questions=questions,
    )

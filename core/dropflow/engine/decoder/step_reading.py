"""What a decode step reads: all that the caches hold, or only the entries that stages have chosen while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.engine.decoder.decide_cache import cache_view
from dropflow.engine.decoder.layer_arguments import Once
from dropflow.engine.decoder.site import Site
from dropflow.engine.model.attention import QueryKey, last_logits
from dropflow.engine.model.tap import untapped
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer
from dropflow.engine.tokens.host import Extent, read
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.masks import parked_mask, taken_mask
from dropflow.engine.tokens.shared_entries import FlowShared
from dropflow.errors import DecisionError
from dropflow.lifecycle.cache_payloads import CacheSelect, CacheView, StepCall
from dropflow.lifecycle.lazy import lazy
from dropflow.lifecycle.stage import Stage


@dataclass(frozen=True, eq=False)
class Active:
    """The entries of a layer that a step reads, where it does not read all of them."""

    mask: Bool[Tensor, "batch keys"]
    """True for entries that are read."""
    kept: LiveSet
    """The same as a live set over entries."""
    visual: Bool[Tensor, "batch keys"]
    """Visual entries."""
    index: KeyIndex
    """The tokens of all entries."""

    @lazy
    def counts(self) -> Int[Tensor, "2 batch"]:
        """Number of entries that are read, and of visual ones among them."""
        return torch.stack([self.mask.sum(1), (self.mask & self.visual).sum(1)])

    @lazy
    def tokens(self) -> Bool[Tensor, "batch length"]:
        """Logical tokens whose entries are read."""
        return _of_tokens(self.mask, self.index)


@dataclass(frozen=True, eq=False)
class _Choice:
    """What one stage wants to be read."""

    first: int
    """First layer that reads only this."""
    tokens: Bool[Tensor, "batch length"]
    """Logical tokens whose entries are read."""


class StepReading:
    """The choices of the stages in one decode step, and the entries of each layer that follow from them.

    They belong to the call: the caches are not touched, so that nothing has to be undone, however the call ends.
    """

    def __init__(
        self, site: Site, held: Mapping[int, FlowLayer | UniformLayer | FlowShared], step: int, length: int
    ) -> None:
        """`held` are the caches by decoder layer; `length` counts logical tokens, the call's one included."""
        self._site, self._held, self._step, self._length = site, held, step, length
        self._asked: dict[int, list[tuple[str, Stage[Any]]]] = {}
        for name, stage in site.plan.hooks.implementers("decode_cache"):
            for layer in stage.decode_reads_at:
                self._asked.setdefault(layer, []).append((name, stage))
        self._choices: dict[str, list[_Choice]] = {}
        self._chosen: dict[str, None] = {}
        self._once = Once()
        self.read: dict[int, Active] = {}
        """What each layer that has run has read, where it did not read all."""

    @property
    def first(self) -> int | None:
        """The first layer at which a stage is asked; `None` if no stage asks."""
        return min(self._asked, default=None)

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """Names of the stages that have chosen in some layer, whatever they answered later."""
        return tuple(self._chosen)

    def involves(self, number: int) -> bool:
        """Whether q and k of a layer are needed: a stage is asked there, or the layer may not read all entries."""
        return number in self._asked or bool(self._wanted(number))

    def of(self, number: int, seen: QueryKey) -> QueryKey | None:
        """The keys, values and mask that a layer about to attend shall read; `None` for those it has.

        Asks the stages first, if they want to be asked in this layer.
        """
        for name, stage in self._asked.get(number, ()):
            self._ask(number, name, stage, seen)
        active = self._active(number, seen.sliding_window)
        if active is None:
            return None
        self.read[number] = active
        assert seen.value is not None
        mask = self._once(
            ("mask", seen.mask, active), lambda: taken_mask(seen.mask, active.kept, flash=self._site.flash)
        )
        key, value = (_taken(states, active.kept.index) for states in (seen.key, seen.value))
        return replace(seen, key=key, value=value, mask=None if mask is None else mask.to(key.device))

    def as_read(self, number: int, seen: QueryKey) -> QueryKey:
        """What a layer has attended to, over all its entries: parked ones are hidden by its mask."""
        active = self.read.get(number)
        if active is None:
            return seen
        return replace(seen, mask=parked_mask(seen.mask, active.mask, flash=self._site.flash))

    def _ask(self, number: int, name: str, stage: Stage[Any], seen: QueryKey) -> None:
        index = self._index(number)
        view = self._view(index)
        call = StepCall(
            self._step,
            replace(view, layer=number, same_as=number),
            index.images,
            lambda: last_logits(self._site.sharded(seen)).to(index.logical.device),
        )
        with untapped():  # the stage may call a model of its own
            answer = self._site.plan.hooks.decode_cache(call, stage)
        if answer is None:
            self._choices.pop(name, None)
            return
        chosen, first = _checked(answer, name, number, view, self._site.plan.shape.layers)
        active = chosen.to(view.valid.device) & view.valid
        self._chosen[name] = None
        self._choices.setdefault(name, []).append(_Choice(first, _of_tokens(active, index)))

    def _wanted(self, number: int) -> tuple[Bool[Tensor, "batch length"], ...]:
        """The tokens that each stage wants a layer to read: its last choice among those that have begun there."""
        begun = ([choice for choice in choices if choice.first <= number] for choices in self._choices.values())
        return tuple(choices[-1].tokens for choices in begun if choices)

    def _active(self, number: int, window: int | None) -> Active | None:
        """The entries that a layer reads; `None` for all. One host synchronisation for layers that hold the same."""
        chosen = self._wanted(number)
        if not chosen:
            return None
        index = self._index(number)
        found: Active | None = self._once(("active", index, window, *chosen), lambda: self._made(index, chosen, window))
        return found

    def _made(self, index: KeyIndex, chosen: tuple[Tensor, ...], window: int | None) -> Active | None:
        view = self._view(index)
        text = (view.image_id < 0) | view.protected
        wanted = torch.stack([tokens.to(text.device).gather(1, index.logical) for tokens in chosen]).all(0)
        stays = (wanted | text) & view.valid
        (same,), counts = read((stays == view.valid).all(), stays.sum(1))
        if same:
            return None
        if window is not None:  # the kernel counts what it gets
            inside = stays & (index.logical >= self._length - window)
            if not bool((inside == stays).all()):
                stays, counts = inside, read(inside.sum(1))[0]
        return Active(stays, LiveSet.of(stays, Extent.of(counts)), view.image_id >= 0, index)

    def _index(self, number: int) -> KeyIndex:
        """Index of all entries of a layer, this step's own included; layers that hold the same share it."""
        index = self._held[number].index
        assert index is not None
        found: KeyIndex = self._once(("index", index), lambda: index.upto(self._length))
        return found

    def _view(self, index: KeyIndex) -> CacheView:
        found: CacheView = self._once(("view", index), lambda: cache_view(0, index))
        return found


def _of_tokens(entries: Bool[Tensor, "batch keys"], index: KeyIndex) -> Bool[Tensor, "batch length"]:
    """The logical tokens of some entries, which must not be padding."""
    spare = index.logical.masked_fill(~entries, index.length)  # a column nobody reads
    tokens = torch.zeros(len(entries), index.length + 1, dtype=torch.bool, device=entries.device)
    return tokens.scatter(1, spare, True)[:, :-1]


def _taken(states: Tensor, index: Int[Tensor, "batch slots"]) -> Tensor:
    """Keys or values (batch, heads, slots, dim) of the entries in `index`."""
    index = index.to(states.device)
    if len(index) == 1 == len(states):
        return states.index_select(2, index[0])
    rows = torch.arange(len(index), device=states.device)[:, None]
    return states.transpose(1, 2)[rows, index].transpose(1, 2)


def _checked(answer: object, name: str, number: int, view: CacheView, layers: int) -> tuple[Tensor, int]:
    """The entries that an answer wants to be read, and the first layer that reads only these.

    Raises `DecisionError` for an answer that makes no sense.
    """
    where, start = f"in layer {number} of a decode step, expected", f"stages.{name}: `decode_cache` answered"
    if not isinstance(answer, CacheSelect):
        raise DecisionError(
            f"{start} {type(answer).__name__} {where} `CacheSelect` or `None`; to evict entries, use a stage without "
            "`decode_reads_at`"
        )
    active, shape = answer.active, tuple(view.valid.shape)
    plain = isinstance(active, Tensor) and active.layout == torch.strided and active.device.type != "meta"
    if not plain or active.dtype != torch.bool or active.shape != shape:
        got = f"{active.dtype} {tuple(active.shape)}" if isinstance(active, Tensor) else type(active).__name__
        kind = "" if plain or not isinstance(active, Tensor) else f", {active.layout} on {active.device}"
        raise DecisionError(
            f"{start} {got}{kind} {where} a dense torch.bool {shape}, one value per entry of `StepCall.view`"
        )
    given: Any = number if answer.from_layer is None else answer.from_layer
    first = -1 if isinstance(given, bool) or not isinstance(given, Integral) else int(given)
    if not number <= first <= layers:
        raise DecisionError(
            f"{start} `from_layer` {given!r} {where} a layer from {number}, since the others have run, to {layers}, "
            "which reads everything"
        )
    return active, first

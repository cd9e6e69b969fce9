"""Visual states that a turn of a conversation leaves parked, so that later questions can choose among them anew.

They are taken at the first boundary at which a stage prunes, before it decides, with all that a layer gets of a token
beside its state. They ride on the cache, in its first layer, and follow its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.decoder.layer_arguments import Once
from dropflow.engine.decoder.site import Site
from dropflow.engine.decoder.tapped_layer import TappedLayer
from dropflow.engine.model.arguments import parameters_of
from dropflow.engine.tokens.cache import flow_layers
from dropflow.engine.tokens.cache_index import PROTECTED
from dropflow.engine.tokens.cache_layers import FlowLayer
from dropflow.engine.tokens.live_set import LiveSet, picked
from dropflow.engine.tokens.masks import lets_see_later
from dropflow.engine.tokens.prompt import Prompt
from dropflow.engine.tokens.restricting import TOKEN_DIMS, restrict
from dropflow.errors import UnsupportedModel
from dropflow.lifecycle.stage import Window


@dataclass(frozen=True, eq=False)
class Parked:
    """The parked tokens of a batch, right-aligned in each sample, ascending; what is per token has a dimension for
    them."""

    logical: Int[Tensor, "batch parked"]
    """Logical index in the conversation."""
    valid: Bool[Tensor, "batch parked"]
    """False in padding slots."""
    image_id: Int[Tensor, "batch parked"]
    """Number of the image; -1 in padding slots."""
    held_as: Int[Tensor, "batch parked"]
    """Number of the image in the caches, encoded as in `KeyIndex`."""
    protected: Bool[Tensor, "batch parked"]
    extra: Bool[Tensor, "batch parked"] | None
    line: Int[Tensor, "batch parked"] | None
    carried: Float[Tensor, "batch parked carries"] | None
    tower: Float[Tensor, "batch parked"] | None
    video_id: Int[Tensor, "batch parked"] | None
    images: int
    """Upper bound (exclusive) of the numbers of images and videos."""
    lines: int
    hidden: Float[Tensor, "batch parked dim"]
    """States at the boundary."""
    embeds: Float[Tensor, "batch parked dim"]
    """Input embeddings of the decoder."""
    residuals: Mapping[int, Float[Tensor, "batch parked dim"]]
    """What the model adds after layers from the boundary on (see `Backbone.deepstack_residuals`)."""
    queries: Mapping[int, Float[Tensor, "batch heads parked dim"]]
    """q of layers before the boundary whose attention stages read."""
    states: Mapping[int, Float[Tensor, "batch parked dim"]]
    """What layers before the boundary returned whose states stages read."""
    arguments: Mapping[int, Mapping[str, Any]]
    """Layer -> its arguments per token, such as cos and sin."""
    token_dims: Mapping[str, int]
    """Name of an argument -> the dimension of its tokens, from the end."""
    window: Window
    """Where vision takes part."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors with a number for every dimension of a state; those shared by layers count once."""
        found: dict[int, int] = {}

        def count(value: Any, _: str = "") -> Any:
            if isinstance(value, Tensor):
                found[id(value)] = value.numel() * value.element_size()
            return value

        for one in (self.hidden, self.embeds, self.residuals, self.queries, self.states, self.arguments, self.carried):
            _each(one, count)
        return sum(found.values())

    def rows(self, picked: Int[Tensor, "rows"]) -> Parked:
        """The same for some samples."""
        made: dict[int, Any] = {}

        def pick(value: Any, name: str = "") -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in made:
                dim = value.dim() + self.token_dims[name] - 1 if name in self.token_dims else 0
                made[id(value)] = value, value.index_select(dim, picked.to(value.device))
            return made[id(value)][1]

        return replace(self, **{name: _each(getattr(self, name), pick) for name in _PER_TOKEN})

    def followed_by(self, later: Parked) -> Parked:
        """The same with the tokens of a later turn."""
        first = replace(
            later,
            image_id=torch.where(later.image_id < 0, -1, later.image_id + self.images),
            line=None if later.line is None else later.line + self.lines,
            video_id=None
            if later.video_id is None
            else torch.where(later.video_id < 0, -1, later.video_id + self.images),
        )

        once = Once()  # layers that share an argument go on sharing it

        def joined(one: Any, other: Any, name: str) -> Any:
            if isinstance(one, Mapping):
                return {key: joined(one[key], other[key], key if isinstance(key, str) else name) for key in one}
            if isinstance(one, tuple | list):
                return type(one)(joined(*pair, name) for pair in zip(one, other, strict=True))
            if not isinstance(one, Tensor):
                return one
            dim = self.token_dims.get(name, 2 if name == "queries" else 1)
            return once((one, other), lambda: torch.cat((one, other), dim))

        changed = {name: joined(getattr(self, name), getattr(first, name), name) for name in _PER_TOKEN}
        return replace(self, images=self.images + later.images, lines=self.lines + later.lines, **changed)


_PER_TOKEN = tuple(one.name for one in fields(Parked) if one.name not in ("images", "lines", "token_dims", "window"))


class Parking:
    """Collects what one call parks."""

    def __init__(self, site: Site, taps: frozenset[int]) -> None:
        """`taps` are layers whose attention stages read after they ran."""
        self._site, self._taps = site, taps
        self.boundary = site.plan.asks_from
        self._given: dict[int, dict[str, Any]] = {}
        self._once = Once()
        self._found: tuple[LiveSet, Tensor] | None = None

    def see(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the arguments of a layer, as the model gave them.

        Raises `UnsupportedModel` for a mask that parked tokens could not have in a later turn.
        """
        mask = kwargs.get("attention_mask")
        if self._once(("mask", mask), lambda: lets_see_later(mask)):
            raise UnsupportedModel(
                "recall: this model lets tokens see later ones, as where all tokens of an image see each other, which "
                "no mask of a later turn says; set `recall: false`"
            )
        if number >= self.boundary or number in self._taps:
            given = dict(zip(parameters_of(layer), args, strict=False)) | kwargs
            known = {**TOKEN_DIMS, **self._site.backbone.token_arguments}
            self._given[number] = {name: value for name, value in given.items() if name in known and value is not None}

    def park(self, hidden: Tensor, live: LiveSet, live_mask: Tensor, prompt: Prompt) -> None:
        """Park the visual tokens that are live at the boundary."""
        parked = LiveSet.of(live_mask & prompt.visual)
        self._found = parked, parked.restrict(live, hidden, None)

    def result(
        self,
        prompt: Prompt,
        embeds: Tensor,
        residuals: tuple[tuple[Tensor, Tensor], ...],
        seen: int,
        images: int,
        tapped: Callable[[int], TappedLayer],
        states: Mapping[int, tuple[LiveSet, Tensor]],
        window: Window,
    ) -> Parked | None:
        """What is parked, once the call has ended; `None` if it did not come to the boundary.

        `seen` tokens came before the call, with `images` images. The states are detached.
        """
        if self._found is None:
            return None
        live, hidden = self._found
        valid = live.filled
        known, once = self._site.backbone.token_arguments, Once()

        def own(values: Tensor | None) -> Any:
            return None if values is None else live.take(values)

        def restricted(name: str, value: Any) -> Any:
            key = tuple(value) if isinstance(value, list) else value
            return once((name, key), lambda: restrict(name, value, live, known))

        def added(where: Tensor, rows: Tensor) -> Tensor:
            whole = embeds.new_zeros(*where.shape, rows.shape[-1])
            return live.take(whole.masked_scatter(where.to(whole.device)[:, :, None], rows.to(whole)))

        image = torch.where(valid, own(prompt.image_id), -1)
        protected = own(prompt.protected) & valid
        return Parked(
            logical=seen + live.index,
            valid=valid,
            image_id=image,
            held_as=torch.where(valid, image + images + protected * PROTECTED, -1),
            protected=protected,
            extra=own(prompt.extra),
            line=own(prompt.line),
            carried=own(prompt.carried),
            tower=own(prompt.tower),
            video_id=None if prompt.video_id is None else torch.where(valid, own(prompt.video_id), -1),
            images=max(len(prompt.image_sizes), prompt.videos),
            lines=prompt.lines,
            hidden=hidden,
            embeds=own(embeds),
            residuals={number: added(*one) for number, one in enumerate(residuals) if number >= self.boundary},
            queries={number: _slots(tapped(number), live) for number in sorted(self._taps) if number < self.boundary},
            states={
                number: live.restrict(then, found, None)
                for number, (then, found) in states.items()
                if number < self.boundary
            },
            arguments={
                number: {name: restricted(name, value) for name, value in given.items()}
                for number, given in self._given.items()
            },
            token_dims={**TOKEN_DIMS, **known},
            window=window,
        )


def park(cache: Any, parked: Parked) -> None:
    """Let `parked` ride on a cache, without gradients, after what earlier turns have left there."""
    made = Once()

    def detached(value: Any, _: str) -> Any:
        return made((value,), value.detach) if isinstance(value, Tensor) else value

    parked = replace(parked, **{name: _each(getattr(parked, name), detached, name) for name in _PER_TOKEN})
    first = _first(cache)
    if first is not None:
        earlier = first.parked
        first.parked = parked if earlier is None else earlier.followed_by(parked)


def parked_in(cache: Any) -> Parked | None:
    """What earlier turns have parked on a cache; `None` for nothing."""
    first = _first(cache)
    return None if first is None else first.parked


def parked_bytes(cache: Any) -> int:
    """Bytes of what a cache holds parked for later questions (see `recall` of a policy), beside its entries.

    Raises `UnsupportedModel` for anything but a cache of transformers.
    """
    if not isinstance(cache, Cache):
        raise UnsupportedModel(
            f"parked_bytes: expected a cache, got {type(cache).__name__}; pass the `{CACHE_ARGUMENT}` of the model's "
            "output (`use_cache=True`)"
        )
    parked = parked_in(cache)
    return 0 if parked is None else parked.nbytes


def _first(cache: Any) -> FlowLayer | None:
    layers = flow_layers(cache) if isinstance(cache, Cache) else {}
    return next((layer for layer in layers.values() if isinstance(layer, FlowLayer)), None)


def _slots(tap: TappedLayer, live: LiveSet) -> Tensor:
    """q (batch, heads, parked, dim) of a tapped layer for the tokens in the slots of `live`."""
    return picked(tap.seen.query, live.index if tap.live is None else tap.live.slots_of(live))


def _each(value: Any, change: Callable[..., Any], name: str = "") -> Any:
    """`change` applied to everything in nested mappings, tuples and lists; it gets the name of an argument."""
    if isinstance(value, Mapping):
        return {key: _each(one, change, key if isinstance(key, str) else name) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_each(one, change, name) for one in value)
    return change(value, name) if name else change(value)

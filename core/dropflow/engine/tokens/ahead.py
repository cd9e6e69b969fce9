"""What a prefix holds of its tokens, and how a call that begins with it gets them without running them again.

Before the first boundary at which a stage may read the question, the states of a prompt's images and of the text before
them are the same for every question. A prefix keeps them from one call. A cache that is made from it holds their
entries *ahead*: its logical length is 0, so the model takes the whole prompt as new and builds masks and positions for
all of it, while the layers before the boundary run only on what follows the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dropflow.engine.tokens.cache import first_held, flow_layers, limit_of
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer
from dropflow.engine.tokens.host import Extent, read
from dropflow.engine.tokens.prompt import Prompt
from dropflow.engine.tokens.states import repeated, tensors_of
from dropflow.errors import UnsupportedCall
from dropflow.lifecycle.stage import Window


@dataclass(frozen=True, eq=False)
class Ahead:
    """The tokens of a prefix, of one sample without padding; `live` counts those that are live at a boundary."""

    ids: Int[Tensor, "prefix"]
    """Token ids."""
    made: Int[Tensor, "tokens"]
    """Ids of text tokens for which the model makes embeddings where a call brings images; usually none."""
    boundary: int
    """The boundary up to which the prefix has run; the number of layers if no stage of the LLM can read a question."""
    window: Window
    """Where vision entered and is to exit."""
    prompt: Prompt
    """What is known of the tokens: (1, prefix)."""
    embeds: Float[Tensor, "1 prefix dim"]
    """Input embeddings of the decoder."""
    entries: Mapping[
        int, tuple[Float[Tensor, "1 kv_heads entries dim"], Float[Tensor, "1 kv_heads entries dim"], KeyIndex]
    ]
    """Keys, values and index of the layers before the boundary that make keys."""
    shared: Mapping[int, KeyIndex]
    """Of the layers before the boundary that share keys: those of the entries of another layer that they see."""
    recurrent: Mapping[int, Any]
    """Cache layers with the states of recurrent and convolution layers before the boundary, after these tokens."""
    segments: tuple[tuple[int, Bool[Tensor, "1 prefix"], int], ...]
    """Which tokens were live from each boundary on, up to this one, and how many."""
    hidden: Float[Tensor, "1 live dim"] | None
    """States of the live tokens at the boundary; `None` after the last layer."""
    queries: Mapping[int, Float[Tensor, "1 heads live dim"]]
    """q of the layers before the boundary whose attention stages read later."""
    states: Mapping[int, Float[Tensor, "1 live dim"]]
    """What layers before the boundary returned whose states stages read later."""
    residuals: tuple[tuple[Bool[Tensor, "1 prefix"], Float[Tensor, "rows dim"]], ...]
    """What the model adds after its first layers (see `Backbone.deepstack_residuals`)."""
    sees_later: tuple[bool, ...]
    """Whether some of the tokens see later ones, in each layer before the boundary."""
    positions: Int[Tensor, "*axes 1 prefix"] | None
    """Position ids, if the model states any to its decoder."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the prefix."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are kept, except small ones (a few numbers per token)."""
        kept = [self.embeds, *(part for keys, values, _ in self.entries.values() for part in (keys, values))]
        kept += [state for layer in self.recurrent.values() for state in tensors_of(layer)]
        kept += [*self.queries.values(), *self.states.values(), *(rows for _, rows in self.residuals)]
        kept += [one for one in (self.hidden, self.prompt.carried) if one is not None]
        return sum(one.numel() * one.element_size() for one in kept)

    def live(self, layer: int) -> Bool[Tensor, "1 prefix"]:
        """The tokens that are live before a layer up to the boundary."""
        return [live for boundary, live, _ in self.segments if boundary <= layer][-1]

    def count(self, layer: int) -> int:
        """Number of these tokens."""
        return [count for boundary, _, count in self.segments if boundary <= layer][-1]


def begin_with(cache: Any, ahead: Ahead) -> None:
    """Let the next call on a fresh cache written under a policy begin with `ahead`; then it is one like others."""
    first = first_held(cache)
    first.ahead, first.begun_with = ahead, ahead.ids


def hand_over(begun: Any, static: Any) -> None:
    """Let a new static cache begin with the prefix that `begun` waits to begin with; that one has begun then.

    Raises `UnsupportedModel` for one all of whose layers have sliding windows.
    """
    limit, first = limit_of(static), first_held(begun)
    for number, layer in flow_layers(begun).items():
        static.layers[number] = FlowLayer(layer.is_sliding, layer.written_by, limit)
    begin_with(static, first.ahead)
    first.ahead = None


def open_ahead(cache: Any, ahead: Ahead, batch: int, rows: Int[Tensor, "batch"], producers: Mapping[int, int]) -> None:
    """Let a cache hold the entries of `ahead` for each of `batch` samples, in which it begins at the tokens `rows`.

    `producers` are the layers that make the keys of those that share some. The entries are those of the prefix, which
    are never written to; states are copied.
    """
    made: dict[KeyIndex, KeyIndex] = {}
    images = len(ahead.prompt.image_sizes)

    def own(index: KeyIndex) -> KeyIndex:
        if index not in made:
            made[index] = _at(index, rows, images)
        return made[index]

    for number, state in ahead.recurrent.items():
        recorded = cache.layers[number].record_past
        cache.layers[number] = repeated(state, batch)
        cache.layers[number].record_past = recorded
    for number, (keys, values, index) in ahead.entries.items():
        layer = cache.layers[number]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = (part.expand(batch, -1, -1, -1) for part in (keys, values))
        layer.index = own(index)
    for number, index in ahead.shared.items():
        cache.layers[producers[number]].shared[number] = own(index)
    first_held(cache).ahead = None


def begun_with(cache: Any) -> Int[Tensor, "prefix"] | None:
    """Ids of the prefix with which a call on this cache begins or has begun; `None` for other caches."""
    found: Tensor | None = getattr(first_held(cache), "begun_with", None)
    return found


def ahead_in(cache: Any) -> Ahead | None:
    """The prefix with which a call on this cache begins; `None` for other caches, and once such a call has begun."""
    found: Ahead | None = getattr(first_held(cache), "ahead", None)
    return found


def uncounted_in(cache: Any) -> Int[Tensor, "batch"] | None:
    """How much padding before each sample the entries' positions do not count, though the model's own do.

    `None` for a cache on which the two agree.
    """
    found: Tensor | None = getattr(first_held(cache), "uncounted", None)
    return found


def first_places(
    valid: Bool[Tensor, "batch tokens"], count: int
) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch count"]]:
    """The first token of each sample that is not padding, and the places of `count` tokens from there on.

    Where fewer are left, the last place is repeated.
    """
    first = valid.long().argmax(1)
    return first, (first[:, None] + torch.arange(count, device=valid.device)).clamp(max=valid.shape[1] - 1)


def begins_at(
    ahead: Ahead,
    ids: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"],
    placeholders: Bool[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch"]:
    """The token at which the prefix begins in each sample: its first that is not padding.

    Raises `UnsupportedCall` where a sample does not begin with the prefix, nothing follows it, or `placeholders` of
    images do. One host synchronisation.
    """
    count = ahead.tokens
    first, place = first_places(valid, count)
    same = ((ids.gather(1, place) == ahead.ids.to(ids.device)) & valid.gather(1, place)).all(1)
    if placeholders is not None and len(ahead.made):
        placeholders = placeholders | torch.isin(ids, ahead.made.to(ids.device))
    shown = valid.new_zeros(1) if placeholders is None else placeholders & valid & (valid.cumsum(1) > count)
    wrong, short, (more,) = read(~same, valid.sum(1) <= count, shown.any())
    for number, (differs, ends) in enumerate(zip(wrong, short, strict=True)):
        if differs or ends:
            what = "ends with" if ends and not differs else "does not begin with"
            raise UnsupportedCall(
                f"input_ids[{number}]: {what} the {count} tokens of the prefix from which its cache was made; pass the "
                "whole prompt, the prefix and at least one token after it, in one forward (`prefill_chunk_size` cuts "
                "prompts), or a fresh cache"
            )
    if more:
        raise UnsupportedCall(
            "input_ids: have image placeholders after the prefix from which the cache was made, or tokens that enclose "
            "them; a question cannot bring images of its own, so ask with the whole prompt and a fresh cache"
        )
    return first


def spread(
    ahead: Ahead,
    first: Int[Tensor, "batch"],
    valid: Bool[Tensor, "batch tokens"],
    instruction: tuple[Tensor, Tensor],
) -> Prompt:
    """What is known of prompts that begin with the prefix, at the tokens `first`; one host synchronisation."""
    own, batch = ahead.prompt, len(valid)
    images, rows = len(own.image_sizes), torch.arange(batch, device=valid.device)[:, None]

    def numbered(number: Tensor | None) -> Tensor | None:
        found = placed(number, first, valid.shape[1], -1)
        return None if found is None else torch.where(found < 0, found, found + rows * images)

    image_id = numbered(own.image_id)
    assert image_id is not None
    there = placed(own.present | ~own.valid, first, valid.shape[1], True)
    assert there is not None
    present, text = valid & there, valid & (image_id < 0)
    after = text & ((image_id >= 0).cumsum(1) > 0)
    counted = read(*(mask.sum(1) for mask in (valid, present, text, after)))
    return replace(
        own,
        image_id=image_id,
        valid=valid,
        present=present,
        protected=placed(own.protected, first, valid.shape[1], False),
        instruction_slots=instruction[0],
        instruction_valid=instruction[1],
        image_sizes=own.image_sizes * batch,
        patches=own.patches.to(valid.device).repeat(batch),
        extents=dict(zip(("valid", "present", "text", "after"), map(Extent.of, counted), strict=True)),
        extra=placed(own.extra, first, valid.shape[1], False),
        line=placed(own.line, first, valid.shape[1], 0),
        carried=placed(own.carried, first, valid.shape[1], 0.0),
        tower=placed(own.tower, first, valid.shape[1], 0.0),
        video_id=numbered(own.video_id),
        videos=images * batch,
        questions=None,
    )


def placed(values: Shaped[Tensor, "1 prefix ..."] | None, first: Int[Tensor, "batch"], tokens: int, fill: float) -> Any:
    """Values of the prefix at its place in each sample of a call of so many tokens, and `fill` elsewhere."""
    if values is None:
        return None
    values, batch = values.to(first.device), len(first)
    found = values.new_full((batch, tokens, *values.shape[2:]), fill)
    rows = torch.arange(batch, device=first.device)[:, None]
    found[rows, first[:, None] + torch.arange(values.shape[1], device=first.device)] = values
    return found


def _at(index: KeyIndex, first: Int[Tensor, "batch"], images: int) -> KeyIndex:
    """The index of a prefix's entries in samples in which it begins at the tokens `first`."""
    rows = torch.arange(len(first), device=first.device)[:, None]
    image = index.image_id.to(first.device).expand(len(first), -1)
    image = torch.where(image < 0, image, image + rows * images)
    dropped = None if index.dropped is None else index.dropped.to(first.device).expand(len(first))
    return KeyIndex(index.logical.to(first.device) + first[:, None], None, image, 0, dropped)

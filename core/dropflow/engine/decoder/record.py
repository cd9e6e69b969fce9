"""Records the forwards of a prompt and its answer, as tensors until a report is requested."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.engine.decoder.kv_history import KVHistory
from dropflow.engine.tokens.cache import counter_of, indices_of, is_flow_cache, is_static
from dropflow.engine.tokens.cache_index import PADDING, KeyIndex
from dropflow.engine.tokens.holdings import Holdings
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.prompt import Prompt

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.backbone.flops import DecoderWidths
    from dropflow.policy.plan import Plan


@dataclass(eq=False)
class CallRecord:
    """One forward that fed all or part of a prompt: its tokens, and which were live from each boundary on."""

    valid: Bool[Tensor, "batch tokens"]
    """False for padding."""
    prompt: Prompt | None = None
    """`None` for a text-only call, in which every token is live."""
    bytes_per_number: int = 0
    """Bytes per number in the hidden states; 0 if not recorded."""
    taken_back: int = 0
    """Number of trailing tokens that are no longer part of the prompt: drafts, and tokens removed by `crop`."""
    past: Holdings | None = None
    """What the caches held before the forward; `None` for nothing."""
    ahead: tuple[int, Bool[Tensor, "batch tokens"]] | None = None
    """Tokens of a prefix, on which the layers before a boundary did not run again; `None` for none."""
    overlap: str | None = None
    """How its images were encoded, where `overlap` is on."""
    segments: list[tuple[int, Tensor]] = field(default_factory=list)
    merges: dict[int, Tensor] = field(default_factory=dict)
    """Boundary -> logical index of the token at whose place each token's state is from there on."""

    def add(self, boundary: int, live: Tensor, merged: Tensor | None = None) -> None:
        """Record that `live` (batch, tokens) applies from `boundary` on, and which tokens were `merged` there."""
        self.segments.append((boundary, live))
        if merged is not None:
            self.merges[boundary] = merged

    @property
    def tokens(self) -> int:
        """Number of tokens, without those taken back."""
        return self.valid.shape[1] - self.taken_back

    @property
    def visual(self) -> Bool[Tensor, "batch tokens"]:
        """Visual tokens of the forward."""
        found = torch.zeros_like(self.valid) if self.prompt is None else self.prompt.visual
        return found[:, : self.tokens]

    @property
    def text(self) -> Bool[Tensor, "batch tokens"]:
        """Text tokens of the forward, excluding padding."""
        return self.valid[:, : self.tokens] & ~self.visual

    def live(self, layers: int) -> Bool[Tensor, "layers batch tokens"]:
        """Tokens that were live before each layer."""
        segments = self.segments or [(0, self.valid)]
        before = [[live for boundary, live in segments if boundary <= layer][-1] for layer in range(layers)]
        return torch.stack(before)[..., : self.tokens]

    def ran(self, layers: int) -> Bool[Tensor, "layers batch tokens"]:
        """Tokens on which each layer ran: the live ones, without those that a prefix held ahead."""
        live = self.live(layers)
        if self.ahead is not None:
            boundary, prefix = self.ahead
            live[:boundary] &= ~prefix[:, : self.tokens]
        return live

    def index_after(self, past: KeyIndex) -> KeyIndex:
        """Index of a cache that held `past`, after this forward, had nothing been dropped."""
        valid, images = self.valid[:, : self.tokens], 0
        image = torch.full_like(valid, -1, dtype=torch.long)
        if self.prompt is not None:
            image, images = self.prompt.image_id[:, : self.tokens], len(self.prompt.image_sizes)
        whole = LiveSet.whole(valid.shape[0], valid.shape[1], valid.device)
        return past.followed_by(whole, torch.where(valid, image, PADDING), None, images)


class PromptRecord:
    """A prompt, fed in one or several forwards, and what has followed on its cache."""

    def __init__(self, plan: Plan, backbone: Backbone, cache: Any, past: KeyIndex) -> None:
        """`past` is what the cache would have held before without drops; `cache` (or `None`) is referenced weakly."""
        self.plan, self._backbone, self._past = plan, backbone, past
        self._index: KeyIndex | None = past
        self._whole: KeyIndex | None = None
        """`index`, without what was cropped from a cache on which nothing was dropped; `None` if nothing was."""
        self._flows = False
        """Whether the cache itself records which tokens it holds."""
        self.over = False
        """Whether the cache no longer holds the prompt: it was emptied, or cropped to before it."""
        self._cache = None if cache is None else weakref.ref(cache)
        self.parts: list[CallRecord] = []
        self.history: KVHistory | None = None
        """`None` without a cache; without steps on a static cache until `catch_up`."""
        self._seen_by_layer: tuple[Tensor, Tensor] | None = None
        """Of a static cache: two scalars whose sum is the number of logical tokens seen, compiled steps included."""

    @property
    def widths(self) -> DecoderWidths:
        """Widths of the text decoder."""
        return self._backbone.decoder_widths

    @property
    def work_without_attention(self) -> Mapping[int, int]:
        """Multiply-adds per token of every layer without attention."""
        return self._backbone.work_without_attention

    @property
    def attending(self) -> Sequence[int]:
        """Decoder layers with attention, which read cache entries: their own, or those of the layer they share with."""
        return self.plan.shape.with_attention

    @property
    def holding(self) -> Sequence[int]:
        """Decoder layers whose caches have entries: those that make keys."""
        return self.plan.shape.holding

    @property
    def cache(self) -> Any:
        """The cache that holds the prompt; `None` if there was none, it no longer exists, or holds something else."""
        return None if self._cache is None or self.over else self._cache()

    @property
    def prompt(self) -> Prompt | None:
        """The `Prompt` of the last forward that brought visual tokens."""
        return next((part.prompt for part in reversed(self.parts) if part.prompt is not None), None)

    @property
    def before(self) -> int:
        """Number of logical tokens of earlier turns."""
        return self._past.length

    @property
    def length(self) -> int:
        """Number of logical tokens seen by the end of the prompt."""
        return self.before + sum(part.tokens for part in self.parts)

    @property
    def index(self) -> KeyIndex:
        """Index of a cache after the prompt, had nothing been dropped."""
        if self._index is None:
            self._index = reduce(lambda index, part: part.index_after(index), self.parts, self._past)
        return self._index

    @property
    def whole(self) -> KeyIndex:
        """Index of a cache on which nothing was dropped: what it still holds of the prompt, and text since."""
        return self.index if self._whole is None else self._whole

    def follow(self, seen: int | None) -> None:
        """Notice what a caller did to the cache between two calls: crop it, or empty it to use it again.

        It has seen `seen` logical tokens; `None` if only its device knows.
        """
        cache, history = self.cache, self.history
        if cache is None or history is None:
            return
        fixed, flows = self._seen_by_layer, is_flow_cache(cache)
        replaced = (self._flows and not flows) or (fixed is not None and not _same(counter_of(cache), fixed))
        emptied = seen is not None and not flows and is_static(cache) and seen < history.length
        if replaced or emptied or (seen is not None and seen <= self.before):
            self.over = True
            if emptied and seen is not None:
                history.forget(seen)
        elif seen is not None and not flows and seen < self.whole.length:
            self._whole = self.whole.first(seen)

    def feed(self, part: CallRecord, before: Sequence[KeyIndex] | None) -> None:
        """Add one more forward of the prompt; `before` are the indices of the layers' caches before it."""
        length = self.length
        if length and self._cache is not None:
            part.past = Holdings.of(before or self._dense(), length)
        self.parts.append(part)
        self._index = self._whole = None
        if self._cache is not None:
            self.history = KVHistory(self.held(), length + part.valid.shape[1])
            self._seen_by_layer, self._flows = counter_of(self.cache), is_flow_cache(self.cache)

    def cut(self, length: int) -> None:
        """Remove tokens from the end of the prompt after its cache was cropped to `length` logical tokens."""
        surplus = self.length - length
        while surplus > 0 and self.parts:
            last = self.parts[-1]
            if last.tokens > surplus:
                last.taken_back += surplus
                break
            surplus -= last.tokens
            self.parts.pop()
        self._index = self._whole = None

    def step(self, tokens: int, read: Mapping[int, Tensor]) -> None:
        """Record a forward of `tokens` after the prompt; `read` is what layers read that did not read all they held."""
        if self.history is not None:
            counter = counter_of(self.cache)
            if _same(counter, self._seen_by_layer):
                return  # the cache itself counts, as for compiled steps
            self.catch_up()
            self._seen_by_layer, self._flows = counter, is_flow_cache(self.cache)
            own = {number: read[layer] for number, layer in enumerate(self.attending) if layer in read} if read else {}
            self.history.note(self.held(), self._seen(self.history.length + tokens), own)

    def catch_up(self) -> None:
        """Record the steps of one token that have run on a static cache since, compiled or not.

        They evict nothing and read everything. One host synchronisation for a static cache, none for others.
        """
        if self.history is not None and self._seen_by_layer is not None:
            entries, lag = self._seen_by_layer
            for length in range(self.history.length + 1, int(entries + lag) + 1):
                self.history.append(length)

    def held(self) -> Sequence[KeyIndex]:
        """Index of the cache entries that each layer with attention reads."""
        return indices_of(self.cache, self.plan.shape) or self._dense()

    def seen_now(self) -> int:
        """Number of logical tokens the cache has seen, or had seen when it was last used."""
        history, cache = self.history, self.cache
        last = self.length if history is None else history.length
        return last if cache is None else int(cache.get_seq_length())

    def live(self) -> Bool[Tensor, "layers batch tokens"]:
        """Tokens of the whole prompt that were live before each layer."""
        return torch.cat([part.live(self.plan.shape.layers) for part in self.parts], 2)

    def merges(self) -> Mapping[int, Int[Tensor, "batch tokens"]]:
        """Boundary -> logical index, in the whole prompt, of the token that each token was merged into."""
        found = {}
        for boundary in sorted({boundary for part in self.parts for boundary in part.merges}):
            start, pieces = 0, []
            for part in self.parts:
                own = torch.arange(part.valid.shape[1], device=part.valid.device).expand_as(part.valid)
                pieces.append(part.merges.get(boundary, own)[:, : part.tokens] + start)
                start += part.tokens
            found[boundary] = torch.cat(pieces, 1)
        return found

    def _dense(self) -> Sequence[KeyIndex]:
        return (self.whole,) * len(self.attending)

    def _seen(self, otherwise: int) -> int:
        """Number of logical tokens the cache has seen; `otherwise` if the cache keeps that number on its device."""
        cache = self.cache
        length = None if cache is None else cache.get_seq_length()
        return length if isinstance(length, int) else otherwise


def _same(counter: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor] | None) -> bool:
    return counter is not None and other is not None and counter[0] is other[0]

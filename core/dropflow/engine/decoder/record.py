"""What happened in the forwards of a prompt and of its answer, kept as tensors until somebody asks for the report."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.backbone.flops import DecoderWidths
from dropflow.engine.decoder.kv_history import KVHistory
from dropflow.engine.tokens.cache import indices_of
from dropflow.engine.tokens.cache_index import PADDING, KeyIndex
from dropflow.engine.tokens.holdings import Holdings
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.prompt import Prompt

if TYPE_CHECKING:
    from dropflow.policy.plan import Plan


@dataclass(eq=False)
class CallRecord:
    """One forward that fed a prompt or a part of it: its tokens, and which were live from each boundary on."""

    valid: Bool[Tensor, "batch tokens"]
    """False for padding."""
    prompt: Prompt | None = None
    """`None` for a call of text alone, in which every token is live."""
    bytes_per_number: int = 0
    """Of the states; 0 where nobody has looked."""
    taken_back: int = 0
    """Tokens at its end that are no longer part of the prompt: drafts, and what `crop` has removed."""
    past: Holdings | None = None
    """What the caches held before it; `None` for nothing."""
    segments: list[tuple[int, Tensor]] = field(default_factory=list)
    merges: dict[int, Tensor] = field(default_factory=dict)
    """Boundary -> logical index of the token in whose place each one's state is from there on."""

    def add(self, boundary: int, live: Tensor, merged: Tensor | None = None) -> None:
        """Note that `live` (batch, tokens) holds from `boundary` on, and who was `merged` into whom there."""
        self.segments.append((boundary, live))
        if merged is not None:
            self.merges[boundary] = merged

    @property
    def tokens(self) -> int:
        """How many it has."""
        return self.valid.shape[1] - self.taken_back

    @property
    def visual(self) -> Bool[Tensor, "batch tokens"]:
        """Its visual tokens."""
        found = torch.zeros_like(self.valid) if self.prompt is None else self.prompt.visual
        return found[:, : self.tokens]

    @property
    def text(self) -> Bool[Tensor, "batch tokens"]:
        """Its text tokens, padding excluded."""
        return self.valid[:, : self.tokens] & ~self.visual

    def live(self, layers: int) -> Bool[Tensor, "layers batch tokens"]:
        """Tokens that were live before each layer."""
        segments = self.segments or [(0, self.valid)]
        before = [[live for boundary, live in segments if boundary <= layer][-1] for layer in range(layers)]
        return torch.stack(before)[..., : self.tokens]

    def index_after(self, past: KeyIndex) -> KeyIndex:
        """What a cache that holds `past` would hold after it, had nothing been dropped."""
        valid, images = self.valid[:, : self.tokens], 0
        image = torch.full_like(valid, -1, dtype=torch.long)
        if self.prompt is not None:
            image, images = self.prompt.image_id[:, : self.tokens], len(self.prompt.image_sizes)
        whole = LiveSet.whole(valid.shape[0], valid.shape[1], valid.device)
        return past.followed_by(whole, torch.where(valid, image, PADDING), None, images)


class PromptRecord:
    """A prompt, fed in one forward or in several, and what has followed on its cache."""

    def __init__(self, plan: Plan, widths: DecoderWidths, cache: Any, past: KeyIndex) -> None:
        """`past` is what the cache held before, had nothing been dropped; `cache` is held weakly, `None` for none."""
        self.plan, self.widths, self._past = plan, widths, past
        self._index: KeyIndex | None = past
        self._cache = None if cache is None else weakref.ref(cache)
        self.parts: list[CallRecord] = []
        self.history: KVHistory | None = None
        """`None` without a cache."""

    @property
    def cache(self) -> Any:
        """The cache it was written to; `None` when there was none, or when it is gone."""
        return None if self._cache is None else self._cache()

    @property
    def prompt(self) -> Prompt | None:
        """The last forward's that brought visual tokens."""
        return next((part.prompt for part in reversed(self.parts) if part.prompt is not None), None)

    @property
    def before(self) -> int:
        """Logical tokens of earlier turns."""
        return self._past.length

    @property
    def length(self) -> int:
        """Logical tokens seen at the end of the prompt."""
        return self.before + sum(part.tokens for part in self.parts)

    @property
    def index(self) -> KeyIndex:
        """What a cache would hold after the prompt, had nothing been dropped."""
        if self._index is None:
            self._index = reduce(lambda index, part: part.index_after(index), self.parts, self._past)
        return self._index

    def feed(self, part: CallRecord, before: Sequence[KeyIndex] | None) -> None:
        """Take one forward more of the prompt, before which the layers' caches had these indices."""
        length = self.length
        if length and self._cache is not None:
            part.past = Holdings.of(before or self._dense(), length)
        self.parts.append(part)
        self._index = None
        if self._cache is not None:
            self.history = KVHistory(self.held(), length + part.valid.shape[1])

    def cut(self, length: int) -> None:
        """Forget tokens at the end of the prompt, of which a cache that was cropped has seen `length`."""
        surplus = self.length - length
        while surplus > 0 and self.parts:
            last = self.parts[-1]
            if last.tokens > surplus:
                last.taken_back += surplus
                break
            surplus -= last.tokens
            self.parts.pop()
        self._index = None

    def step(self, tokens: int) -> None:
        """Take a forward of `tokens` after the prompt."""
        if self.history is not None:
            self.history.note(self.held(), self._seen(self.history.length + tokens))

    def held(self) -> Sequence[KeyIndex]:
        """What each layer's cache holds."""
        return indices_of(self.cache) or self._dense()

    def seen_now(self) -> int:
        """Logical tokens that the cache has seen, or had seen when it was last used."""
        history, cache = self.history, self.cache
        last = self.length if history is None else history.length
        return last if cache is None else int(cache.get_seq_length())

    def live(self) -> Bool[Tensor, "layers batch tokens"]:
        """Tokens of the whole prompt that were live before each layer."""
        return torch.cat([part.live(self.plan.shape.layers) for part in self.parts], 2)

    def merges(self) -> Mapping[int, Int[Tensor, "batch tokens"]]:
        """Boundary -> logical index, in the whole prompt, of the token that each one's state was merged into."""
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
        return (self.index,) * self.plan.shape.layers

    def _seen(self, otherwise: int) -> int:
        """Logical tokens that the cache has seen; `otherwise` where it counts on its device."""
        cache = self.cache
        length = None if cache is None else cache.get_seq_length()
        return length if isinstance(length, int) else otherwise

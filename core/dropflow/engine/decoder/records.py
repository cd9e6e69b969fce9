"""Groups the forwards under a policy into prompts and what follows them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import Cache

from dropflow.engine.decoder.record import CallRecord, PromptRecord
from dropflow.engine.tokens.cache_index import KeyIndex

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.policy.plan import Plan


@dataclass(eq=False)
class Forward:
    """What records need to know of one forward of the text decoder."""

    tokens: int
    generating: object | None
    """Identifies the `generate` prefill it is part of, one object for all its forwards; `None` outside a prefill."""
    part: CallRecord | None = None
    """What it adds to a prompt if it is part of one; `None` for a forward that can only follow a prompt."""
    drafts: int = 0
    """Number of trailing tokens that are drafts, which `generate` appends to a prompt to verify them."""
    seen: int = 0
    """Number of logical tokens its cache had seen before; set only if `part` is."""
    stated: bool = False
    """Whether a mask (batch, tokens) says which of its tokens are padding."""
    real: Bool[Tensor, "batch tokens"] | None = None
    """False for padding among the tokens seen before; `None` if unknown."""
    before: Sequence[KeyIndex] | None = None
    """What each layer's cache held before; `None` for a cache that was not written under a policy."""
    cache: Any = None
    read: Mapping[int, Tensor] = field(default_factory=dict)
    """Decoder layers that did not read all their entries: how many, and how many visual ones, they read (2, batch)."""


class Records:
    """The last prompt that brought images, and prompts whose caches later forwards may continue.

    A prompt may be fed in several forwards. The forwards of one `generate` prefill belong together; elsewhere,
    consecutive forwards on one cache that bring images or several tokens.
    """

    def __init__(self, plan: Plan, backbone: Backbone) -> None:
        self._plan, self._backbone = plan, backbone
        self.last: PromptRecord | None = None
        self._by_cache: weakref.WeakKeyDictionary[Any, _Fed] = weakref.WeakKeyDictionary()

    def begin(self, cache: Any, seen: int | None = None) -> None:
        """Look at the cache of a forward that is about to run, and end records of what it no longer holds.

        It has seen `seen` logical tokens; by default the cache is asked, unless only its device knows.
        """
        if not isinstance(cache, Cache):
            return
        fed, last = self._by_cache.get(cache), self.last
        known = [] if fed is None else [fed.record]
        if last is not None and last.cache is cache and last not in known:
            known.append(last)
        if known and seen is None:
            length = cache.get_seq_length()
            seen = length if isinstance(length, int) else None
        for record in known:
            record.follow(seen)
        if fed is not None and fed.record.over:
            del self._by_cache[cache]

    def add(self, forward: Forward) -> None:
        """Record a forward that has ended."""
        cache, part, last = forward.cache, forward.part, self.last
        fed = None if cache is None else self._by_cache.get(cache)
        joins = fed is not None and part is not None and fed.joined_by(forward, part)
        replaced = joins or (part is not None and part.prompt is not None)
        if last is not None and cache is not None and last.cache is cache and not replaced:
            last.step(forward.tokens, forward.read)
        if part is None and fed is not None:
            fed.open = False
        if part is None or (cache is None and part.prompt is None):
            return
        if fed is None or not joins:
            fed = _Fed(self._begun(forward, part, fed), forward.generating)
            if cache is not None:
                self._by_cache[cache] = fed
        part.taken_back = forward.drafts
        fed.record.feed(part, forward.before)
        fed.open = not forward.drafts
        if part.prompt is not None:
            self.last = fed.record

    def _begun(self, forward: Forward, part: CallRecord, fed: _Fed | None) -> PromptRecord:
        """A record of a new prompt, on a cache that may hold earlier turns."""
        seen, batch = forward.seen, len(part.valid)
        known = None if fed is None else fed.record.whole
        if known is not None and len(known.logical) == batch:
            past = known.upto(seen) if known.length <= seen else known.first(seen)
        else:
            past = KeyIndex.plain(batch, seen, part.valid.device, forward.real)
        return PromptRecord(self._plan, self._backbone, forward.cache, past)


class _Fed:
    """A prompt that later forwards may extend."""

    def __init__(self, record: PromptRecord, generating: object | None) -> None:
        self.record, self._generating = record, generating
        self.open = True

    def joined_by(self, forward: Forward, part: CallRecord) -> bool:
        """Whether a forward extends this prompt; tokens cropped in the meantime are removed from it."""
        record = self.record
        if not self.open or forward.generating is not self._generating or forward.drafts:
            return False
        if len(part.valid) != len(record.parts[0].valid) or not record.before < forward.seen <= record.length:
            return False
        if forward.seen < record.length:
            record.cut(forward.seen)
        return True

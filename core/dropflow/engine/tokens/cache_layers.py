"""Cache layers under a policy: each may hold different tokens, but reports the logical length."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.live_set import LiveSet, picked
from dropflow.engine.tokens.room import Growing, Room
from dropflow.errors import UnsupportedCall, UnsupportedModel

serving: ContextVar[Callable[[], bool] | None] = ContextVar("dropflow_serving", default=None)
"""Returns whether a model runs under a policy in this thread; after an interrupted call, it returns false."""


DYNAMIC = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of transformers that grow with what they hold."""
STATIC = (StaticLayer, StaticSlidingWindowLayer)
"""Layers of transformers of fixed size."""


class Indexed:
    """The part of a cache layer that records which logical tokens its entries hold."""

    index: KeyIndex | None
    """The tokens of the first entries; `None` if every entry holds the token at its own position."""
    prompt: int
    """Number of logical tokens seen when the last prompt was recorded."""
    written_by: Any
    """Identifies the writer: any value that is equal for equal policies on equal backbones.

    `None` for nobody: an emptied layer is as good as transformers' own, for any policy and for a model without one.
    """
    begun_with: Tensor | None = None
    """Ids (tokens,) of the prefix that a call on this cache has begun or will begin with, in its first layer."""
    uncounted: Tensor | None = None
    """How many tokens of padding before each sample (batch,) the positions of its entries do not count though the
    model's own do, in the first layer of a cache that began with a prefix; `None` for none."""
    shared: dict[int, KeyIndex]
    """The same entries as another decoder layer that reads them sees them, by its number; a layer without an entry here
    sees them all."""

    @property
    def length(self) -> int:
        """Number of logical tokens seen: those of the index, plus one for each entry appended since."""
        raise NotImplementedError

    def set_index(self, index: KeyIndex) -> None:
        """Record which tokens the entries hold, after a call that stored fewer tokens than it saw."""
        self.index, self.prompt = index, index.length

    def seen_by(self, layer: int) -> KeyIndex | None:
        """The index as another decoder layer sees the entries that it reads here."""
        return self.shared.get(layer, self.index)

    def each_shared(self, change: Callable[[KeyIndex], KeyIndex]) -> None:
        """Change what other layers see as the entries change; layers that see the same keep one index."""
        made = {index: change(index) for index in dict.fromkeys(self.shared.values())}
        self.shared = {layer: made[index] for layer, index in self.shared.items()}

    def full_index(self) -> KeyIndex:
        """Index of all entries held now, including implicit ones; the layer must hold some."""
        raise NotImplementedError

    def take_back(self, count: int) -> None:
        """Remove the last `count` entries of the index, which must be text; raises `UnsupportedCall` otherwise."""
        assert self.index is not None
        try:
            self.index = self.index.without_last(count)
        except ValueError as fault:
            raise UnsupportedCall(
                f"{CACHE_ARGUMENT}: crop: {fault}; take back less, or empty the cache by `reset`"
            ) from None
        self.each_shared(lambda seen: seen.without_last(count))
        self.prompt = min(self.prompt, self.index.length)

    def _check_served(self) -> None:
        if self.written_by is None:
            return
        alive = serving.get()
        if (alive is None or not alive()) and not _asked_by_generate():
            raise UnsupportedCall(
                f"{CACHE_ARGUMENT}: this cache was written under a policy; attach the policy again to continue with "
                "it, or start with a fresh cache"
            )


def _asked_by_generate() -> bool:
    """Whether `generate` is preparing masks for a static cache before any model runs."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("transformers.models.") and frame.f_code.co_name == "forward":
            return False
        if name.startswith("transformers.generation."):
            return True
        frame = frame.f_back
    return False


class FlowLayer(Indexed, Growing, DynamicLayer):  # type: ignore[misc]  # transformers ships no types
    """A cache layer that may hold fewer entries than tokens were seen.

    `get_seq_length` and `get_mask_sizes` count logical tokens, so that position ids, masks and `generate`'s slicing
    are the same as without pruning. A sliding window is enforced by the model's own full-length mask, so the memory
    that a sliding cache would save is not saved. Tensors with room for more hold the entries while decoding (see
    `Room`); `keys` and `values` are views of exactly those that are held.
    """

    keys: Tensor
    values: Tensor
    _layer_type = None  # transformers must not create this layer by itself

    def __init__(self, is_sliding: bool = False, written_by: Any = None, limit: int | None = None) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.index, self.prompt, self.written_by, self.shared = None, 0, written_by, {}
        self._notes: dict[str, Tensor] = {}
        self.rooms = Room(), Room()
        self.limit = limit
        """Number of tokens that a static cache may see, for which this layer stands during a call; else `None`."""
        self.ahead: Any = None
        """The prefix with which the next call begins (`Ahead`), in the first layer of a cache; `None` for none."""
        self.parked: Any = None
        """What later turns may recall (`Parked`), in the first layer of a cache; `None` for nothing."""

    @classmethod
    def adopt(
        cls,
        layer: Any,
        where: str,
        written_by: Any = None,
        real: Tensor | None = None,
        limit: int | None = None,
    ) -> FlowLayer:
        """Convert an ordinary dynamic or static layer, or one of this kind that was emptied, and its contents.

        `real` (batch, tokens) is false for entries that hold padding. `limit` is that of a static cache. Raises
        `UnsupportedModel` for other kinds.
        """
        if type(layer) not in (*DYNAMIC, *STATIC, cls):
            raise UnsupportedModel(
                f"{where}: a cache layer of type {type(layer).__name__} cannot hold a different length per layer; "
                "use transformers' DynamicCache (cache_implementation=None or 'dynamic') or StaticCache"
            )
        seen = int(layer.get_seq_length())
        adopted = cls(layer.is_sliding, written_by, limit)
        if seen:
            keys: Tensor = layer.keys[..., :seen, :] if type(layer) in STATIC else layer.keys
            values: Tensor = layer.values[..., :seen, :] if type(layer) in STATIC else layer.values
            kept = keys.shape[-2] - (type(layer) is StaticSlidingWindowLayer and seen >= layer.keys.shape[-2])
            if kept != seen:  # a full window of fixed size drops one next, for which the model's mask has no column
                raise UnsupportedModel(
                    f"{where}: its sliding window has already dropped tokens ({seen} seen, {kept} kept); attach the "
                    "policy before the first turn, and bring an image in it"
                )
            adopted.lazy_initialization(keys, values)
            adopted.keys, adopted.values = keys, values
            adopted.set_index(KeyIndex.plain(keys.shape[0], seen, keys.device, real))
        return adopted

    @property
    def is_compileable(self) -> bool:
        """Whether it stands for a layer of a static cache that still waits for its prompt: steps can be compiled."""
        return self.limit is not None and not self.is_initialized

    @property
    def length(self) -> int:
        """Logical tokens seen."""
        held = self.keys.shape[-2] if self.holds else 0
        return held if self.index is None else self.index.length + held - len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled layer makes room of its own."""
        return self.__dict__ | {"rooms": (Room(), Room())}

    def remember(self, stage: str, notes: Tensor) -> None:
        """Store a stage's number for each entry (batch, entries)."""
        self._notes[stage] = notes

    def recall(self, stage: str) -> Tensor | None:
        """A stage's numbers, one per entry held now; 0 for entries added since, `None` if none were stored."""
        notes = self._notes.get(stage)
        return None if notes is None else torch.nn.functional.pad(notes, (0, self.keys.shape[-2] - notes.shape[1]))

    def full_index(self) -> KeyIndex:
        """Index of all entries held now."""
        if self.index is None:
            return KeyIndex.plain(self.keys.shape[0], self.keys.shape[-2], self.keys.device)
        return self.index.upto(self.length)

    def evict(self, kept: LiveSet, index: KeyIndex) -> None:
        """Keep only the entries in the slots of `kept`, a live set over entries; `index` describes what they hold."""
        self._notes = {stage: kept.take(notes) for stage in self._notes if (notes := self.recall(stage)) is not None}
        length = self.length
        self.each_shared(lambda seen: seen.upto(length).compacted(kept))
        self.index = index
        self._replace(picked(self.keys, kept.index), picked(self.values, kept.index))

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold other entries, and give up the room that was made for more of these."""
        self.keys, self.values, self.rooms = keys, values, (Room(), Room())

    def reorder(self, order: Int[Tensor, "batch entries"], index: KeyIndex) -> None:
        """Keep the entries at the places in `order`, in that order; `index` describes what they hold."""
        self._replace(picked(self.keys, order), picked(self.values, order))
        self.set_index(index)

    def get_seq_length(self) -> int:
        """Logical tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical length and offset for which the model builds its mask.

        Raises `UnsupportedCall` outside an attached model, where entries would be mistaken for other tokens.
        """
        self._check_served()
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget everything, the policy too."""
        super().reset()
        self.index, self.prompt, self.written_by, self.shared, self.parked = None, 0, None, {}, None
        self._notes, self.rooms = {}, (Room(), Room())
        self.ahead, self.begun_with, self.uncounted = None, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number; they must be generated or text tokens."""
        count = -tokens_to_remove
        if count < 0:
            raise UnsupportedCall(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative integer"
            )
        if count == 0 or not self.holds:
            return
        explicit = 0 if self.index is None else count - (self.length - self.index.length)
        if self.index is not None and explicit > 0:
            self.take_back(explicit)
        self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]
        self._notes = {stage: notes[:, : self.keys.shape[-2]] for stage, notes in self._notes.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples, as in beam search; the index is reordered with the entries."""
        self._pick(beam_idx, lambda: beam_idx, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples of the batch."""
        picked = torch.as_tensor(indices)
        self._pick(indices, lambda: picked, picked)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        if self.holds:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats)
            self._pick(repeats, lambda: rows, rows)

    @property
    def holds(self) -> bool:
        """Whether it holds entries, with an index or without."""
        return bool(self.is_initialized) and self.keys.dim() > 2

    def _pick(self, key: Any, rows: Any, picked: Tensor) -> None:
        if self.uncounted is not None:
            self.uncounted = self.uncounted[picked.to(self.uncounted.device)]
        if self.index is not None:
            self.index = self.index.rows(key, rows)
            self.each_shared(lambda seen: seen.rows(key, rows))
        if self.holds:
            self._replace(self.keys[picked.to(self.keys.device)], self.values[picked.to(self.values.device)])
            self._notes = {stage: notes[picked.to(notes.device)] for stage, notes in self._notes.items()}
            self.parked = None if self.parked is None else self.parked.rows(picked)


def is_quantized(layer: Any) -> bool:
    """Whether a layer of transformers keeps most of its entries quantized, where its `keys` do not show them."""
    return any("Quantized" in kind.__name__ for kind in type(layer).__mro__)


class UniformLayer(Indexed, CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types
    """Wrapper for another kind of layer, such as quantized, in a cache whose layers all hold the same tokens.

    It leaves storage to the wrapped layer and only reports logical lengths.
    """

    _layer_type = None
    is_sliding = False

    def __init__(self, inner: Any, written_by: Any = None) -> None:
        self.inner = inner
        """The wrapped layer."""
        self.index, self.prompt, self.written_by, self.shared = None, 0, written_by, {}

    @classmethod
    def adopt(cls, layer: Any, where: str, written_by: Any = None, real: Tensor | None = None) -> UniformLayer:
        """Wrap a layer and its contents; raises `UnsupportedModel` for kinds without one entry per token.

        `real` as for `FlowLayer.adopt`.
        """
        attention = isinstance(layer, CacheLayerMixin) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        if not attention or layer.is_sliding:
            raise UnsupportedModel(
                f"{where}: a cache layer of type {type(layer).__name__} does not hold one entry per token, so dropped "
                "tokens would be mistaken for others; use transformers' DynamicCache"
            )
        adopted = cls(layer, written_by)
        seen = int(layer.get_seq_length())
        if seen:
            adopted.set_index(KeyIndex.plain(layer.keys.shape[0], seen, layer.keys.device, real))
        return adopted

    @property
    def _shift(self) -> int:
        """Number of logical tokens that no entry holds."""
        return 0 if self.index is None else self.index.length - len(self.index)

    @property
    def length(self) -> int:
        """Number of logical tokens seen; a tensor (without synchronisation) if the layer counts on its device."""
        seen: int = self.inner.get_seq_length() + self._shift
        return seen

    def full_index(self) -> KeyIndex:
        """Index of all entries held now."""
        length = int(self.length)
        if self.index is None:
            return KeyIndex.plain(self.keys.shape[0], length, self.keys.device)
        return self.index.upto(length)

    @property
    def keys(self) -> Any:
        """Keys of the wrapped layer."""
        return self.inner.keys

    @property
    def values(self) -> Any:
        """Values of the wrapped layer."""
        return self.inner.values

    @property
    def is_initialized(self) -> bool:
        """Whether the wrapped layer has stored anything."""
        return bool(self.inner.is_initialized)

    @property
    def is_compileable(self) -> bool:
        """Whether the wrapped layer can be compiled."""
        return bool(self.inner.is_compileable)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while this object is being copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Initialise the wrapped layer."""
        self.inner.lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store new keys and values in the wrapped layer and return its result."""
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """Logical tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The wrapped layer's mask sizes in logical tokens; raises `UnsupportedCall` as `FlowLayer.get_mask_sizes`."""
        self._check_served()
        length, offset = self.inner.get_mask_sizes(query_length)
        return length + self._shift, offset

    def get_max_length(self) -> int:
        """Maximum length of the wrapped layer."""
        most: int = self.inner.get_max_length()
        return most

    def offload(self) -> None:
        """Offload the wrapped layer."""
        self.inner.offload()

    def prefetch(self) -> None:
        """Prefetch the wrapped layer."""
        self.inner.prefetch()

    def reset(self) -> None:
        """Forget everything, the policy too."""
        self.inner.reset()
        self.index, self.prompt, self.written_by, self.shared = None, 0, None, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens in the wrapped layer; they must be generated or text tokens."""
        self._check_divisible("crop")
        if self.index is not None:
            explicit = -tokens_to_remove - (int(self.length) - self.index.length)
            if explicit > 0:
                self.take_back(explicit)
        self.inner.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples, as in beam search."""
        self.inner.reorder_cache(beam_idx)
        if self.index is not None:
            self.index = self.index.rows(beam_idx, lambda: beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples of the batch."""
        self._check_divisible("batch_select_indices")
        self.inner.batch_select_indices(indices)
        if self.index is not None:
            self.index = self.index.rows(indices, lambda: indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        self._check_divisible("batch_repeat_interleave")
        self.inner.batch_repeat_interleave(repeats)
        if self.index is not None:
            batch, device = self.index.logical.shape[0], self.index.logical.device
            rows = torch.arange(batch, device=device).repeat_interleave(repeats)
            self.index = self.index.rows(repeats, lambda: rows)

    def _check_divisible(self, what: str) -> None:
        """Refuse to take entries out of a quantized layer, whose own method reaches only those not quantized yet."""
        if is_quantized(self.inner):
            raise UnsupportedCall(
                f"{CACHE_ARGUMENT}: {what}: not supported by layers of type {type(self.inner).__name__}, which would "
                "change only the last entries; use a plain DynamicCache"
            )

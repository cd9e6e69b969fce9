"""The KV cache under a policy: every layer holds its own tokens and reports the logical length of the whole."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.errors import UnsupportedCall, UnsupportedModel

serving: ContextVar[bool] = ContextVar("dropflow_serving", default=False)
"""True while a model runs under a policy, in this thread."""


class FlowLayer(DynamicLayer):  # type: ignore[misc]  # transformers ships no types
    """A cache layer that may hold fewer entries than tokens were seen.

    `get_seq_length` and `get_mask_sizes` answer in logical tokens, so that position ids, masks and `generate`'s
    slicing come out as without pruning. A sliding window is enforced by the model's own full-length mask, which costs
    the memory that a sliding cache would save.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, is_sliding: bool = False) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.index: KeyIndex | None = None
        self.prompt = 0
        """Logical tokens seen when the last prompt was settled."""
        self._notes: dict[str, Tensor] = {}

    @classmethod
    def adopt(cls, layer: Any, where: str) -> FlowLayer:
        """Take over an ordinary dynamic layer, with what it holds; raises `UnsupportedModel` for other kinds."""
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModel(
                f"{where}: a cache layer of type {type(layer).__name__} cannot hold a different length per layer; "
                "use transformers' DynamicCache (cache_implementation=None or 'dynamic')"
            )
        seen = layer.get_seq_length()
        adopted = cls(layer.is_sliding)
        if seen:
            keys: Tensor = layer.keys
            values: Tensor = layer.values
            if keys.shape[-2] != seen:
                raise UnsupportedModel(
                    f"{where}: its sliding window has already dropped tokens ({seen} seen, {keys.shape[-2]} kept); "
                    "attach the policy before the first turn"
                )
            adopted.lazy_initialization(keys, values)
            adopted.keys, adopted.values = keys, values
            adopted.set_index(KeyIndex.plain(keys.shape[0], seen, keys.device))
        return adopted

    @property
    def length(self) -> int:
        """Logical tokens seen: those of the index, and one for each entry appended since."""
        held = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        return held if self.index is None else self.index.length + held - len(self.index)

    def set_index(self, index: KeyIndex) -> None:
        """State what the entries are, after a call that stored fewer tokens than it saw."""
        self.index, self.prompt = index, index.length

    def remember(self, stage: str, notes: Tensor) -> None:
        """Keep a stage's number for each entry (batch, entries)."""
        self._notes[stage] = notes

    def recall(self, stage: str) -> Tensor | None:
        """A stage's numbers, one for each entry held now; 0 for entries that came since, `None` before any."""
        notes = self._notes.get(stage)
        # a negative width cuts entries that were taken back
        return None if notes is None else torch.nn.functional.pad(notes, (0, self.keys.shape[-2] - notes.shape[1]))

    def full_index(self) -> KeyIndex:
        """Index of all entries held now, implicit ones included; the layer must hold some."""
        if self.index is None:
            return KeyIndex.plain(self.keys.shape[0], self.keys.shape[-2], self.keys.device)
        return self.index.upto(self.length)

    def evict(self, kept: LiveSet, index: KeyIndex) -> None:
        """Hold only the entries in the slots of `kept`, a live set over entries; `index` says what they are."""
        order = kept.index[:, None, :, None].to(self.keys.device)
        take = order.expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self._notes = {stage: kept.take(notes) for stage in self._notes if (notes := self.recall(stage)) is not None}
        self.index = index
        self.keys, self.values = self.keys.gather(2, take), self.values.gather(2, take)

    def get_seq_length(self) -> int:
        """Logical tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical length and offset the model builds its mask for.

        Raises `UnsupportedCall` outside an attached model, where entries would be taken for other tokens.
        """
        if not serving.get():
            raise UnsupportedCall(
                "past_key_values: this cache was written under a policy; attach the policy again to continue with it, "
                "or start with a fresh cache"
            )
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.index, self.prompt, self._notes = None, 0, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number: generated or text ones only."""
        count = -tokens_to_remove
        if count < 0:
            raise UnsupportedCall(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative integer"
            )
        if count == 0 or self.index is None:
            return
        explicit = count - (self.length - self.index.length)
        if explicit > 0:
            self.index = self.index.without_last(explicit)
        self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick samples, as beam search does; the index moves with the entries."""
        self._pick(beam_idx, lambda: beam_idx, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples of the batch."""
        self._pick(indices, lambda: indices, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        if self.index is not None:
            batch, device = self.index.logical.shape[0], self.index.logical.device
            rows = torch.arange(batch, device=device).repeat_interleave(repeats)
            self._pick(repeats, lambda: rows, rows)

    def _pick(self, key: Any, rows: Any, picked: Tensor) -> None:
        if self.index is not None:
            self.index = self.index.rows(key, rows)
            self.keys, self.values = self.keys[picked.to(self.keys.device)], self.values[picked.to(self.values.device)]
            self._notes = {stage: notes[picked.to(notes.device)] for stage, notes in self._notes.items()}


def check_cache(cache: Any, layers: int) -> None:
    """Raise `UnsupportedModel` for a cache that cannot hold a different length per layer."""
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise UnsupportedModel(f"past_key_values: expected a transformers DynamicCache, got {type(cache).__name__}")
    if cache.offloading:
        raise UnsupportedModel("past_key_values: an offloaded cache is not supported; use a plain DynamicCache")
    if cache.layer_class_to_replicate not in (None, DynamicLayer):
        raise UnsupportedModel(
            f"past_key_values: layers of type {cache.layer_class_to_replicate.__name__} cannot hold a different length "
            "each; use a plain DynamicCache"
        )
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, FlowLayer):
            FlowLayer.adopt(layer, f"past_key_values.layers[{number}]")
    if len(cache.layers) > layers:
        raise UnsupportedModel(f"past_key_values: {len(cache.layers)} layers for a decoder of {layers}")


def convert_cache(cache: Cache, layers: int) -> None:
    """Give the caller's own cache object a `FlowLayer` for each of `layers` decoder layers, in place."""
    converted = [
        layer if isinstance(layer, FlowLayer) else FlowLayer.adopt(layer, f"past_key_values.layers[{number}]")
        for number, layer in enumerate(cache.layers)
    ]
    cache.layers[:] = converted + [FlowLayer() for _ in range(layers - len(converted))]


def is_flow_cache(cache: Any) -> bool:
    """Whether the cache was written under a policy."""
    return isinstance(cache, Cache) and bool(cache.layers) and isinstance(cache.layers[0], FlowLayer)

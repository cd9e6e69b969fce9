"""What a flow tells of the last prompt that brought images, and of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dropflow.engine.decoder import report_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer in the last prompt and its answer; means over the samples of the batch."""

    layer: int
    """Number of the decoder layer."""
    visual_tokens: float
    """Live in the layer."""
    kv_entries: float
    """Tokens this layer's cache held after the prefill and its `decode_cache` stages, those of earlier turns too."""
    flops: float
    """Multiply-adds of this layer in the prefill, text included (`dropflow.flops.layer`)."""
    visual_entries_end: float
    """Visual tokens this layer's cache holds at the end of the answer, those of earlier turns too."""
    kv_entries_end: float
    """Tokens this layer's cache holds at the end of the answer."""


@dataclass(frozen=True)
class Report:
    """Tokens, work and memory of the last prompt that brought images, and of its answer; means over the samples.

    The prefill is the whole prompt, in however many forwards it was fed. FLOPs are multiply-adds of the decoder layers
    by closed formula, text included, the work of ranking and the LM head left out. KV entries of earlier turns count,
    those that pad the prompts of a ragged batch do not. Each beam, and each returned sequence, is a sample. Without a
    cache (`use_cache=False`) nothing is held, so that all KV numbers are 0.
    """

    policy: str
    """Name of the policy."""
    layers: tuple[LayerReport, ...]
    """One row per decoder layer."""
    average_visual_tokens: float
    """Visual tokens per layer in the prefill, averaged over all L layers."""
    entry_visual_tokens: float
    """Visual tokens handed to the LLM, after the encode stages."""
    flops: float
    """Of all decoder layers, in the prefill."""
    flops_dense: float
    """The same with every visual token in every layer."""
    kv_bytes: float
    """Of all layers after the prefill and what `decode_cache` stages evicted then, in the dtype of the states."""
    kv_bytes_dense: float
    """The same with every visual token in every layer."""
    steps: int
    """Tokens that the cache has taken in since the prefill, in the answer and in later turns of text.

    The last token that `generate` returns was never fed, and drafts that were taken back do not count.
    """
    kv_bytes_end: float
    """Bytes held now, at the end of the answer; of a cache that is gone, after its last forward."""
    kv_bytes_end_dense: float
    """The same with every visual token in every layer, and nothing evicted."""
    kv_entries_over_time: tuple[float, ...]
    """KV entries of all layers together, after the prefill and after each forward since, evictions included."""
    average_visual_tokens_answer: float
    """Visual tokens that a layer attends to, averaged over all layers and over the forwards of prompt and answer.

    The prefill counts once, with the visual tokens live in each layer; every later forward once, with the visual
    entries that each layer's cache held when it began. Those of earlier turns count in both.
    """

    def plot(self) -> Figure:
        """Draw visual tokens and KV entries per layer, with the `figures` extra; raises `ImportError` without it."""
        return report_view.figure(self)

    def __repr__(self) -> str:
        return report_view.line(self)

    def __str__(self) -> str:
        """A table by layer, and what it sums up to."""
        return report_view.table(self)

    def _repr_html_(self) -> str:
        return report_view.html(self)

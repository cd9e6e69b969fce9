"""The report of a flow on the last prompt that brought images, and on its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dropflow.engine.decoder import report_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerReport:
    """The numbers of one decoder layer for the last prompt and its answer, as means over the samples of the batch."""

    layer: int
    """Number of the decoder layer."""
    visual_tokens: float
    """Visual tokens live in the layer in the prefill."""
    kv_entries: float
    """Tokens in this layer's cache after the prefill and its `decode_cache` stages, including earlier turns."""
    flops: float
    """Multiply-adds of this layer in the prefill, text included (`dropflow.flops.layer`)."""
    visual_entries_end: float
    """Visual tokens in this layer's cache at the end of the answer, including earlier turns."""
    kv_entries_end: float
    """Tokens in this layer's cache at the end of the answer, including earlier turns."""
    kv_entries_read: float
    """Tokens that this layer attends to in a forward after the prompt, its own included, as the mean over these
    forwards: fewer than it holds where a stage chooses what a step reads. 0 before the first of them."""


@dataclass(frozen=True)
class Report:
    """Tokens, work and memory of the last prompt that brought images, and of its answer, as means over the samples.

    The prefill is the whole prompt, in however many forwards it was fed. FLOPs are multiply-adds of the decoder layers
    by a closed formula; they include text but neither ranking nor the LM head. KV entries of earlier turns count, but
    padding in a ragged batch does not. Each beam and each returned sequence is a sample. Without a cache
    (`use_cache=False`) all KV numbers are 0.
    """

    policy: str
    """Name of the policy."""
    layers: tuple[LayerReport, ...]
    """One row per decoder layer."""
    average_visual_tokens: float
    """Visual tokens per layer in the prefill, averaged over all L layers."""
    entry_visual_tokens: float
    """Visual tokens that enter the LLM, after the `encode` stages."""
    tower_visual_tokens: float | None
    """Visual tokens whose patches a layer of the vision tower ran on, averaged over its layers: fewer than
    `tower_visual_tokens_dense` if stages left some out before the tower or inside it. `None` where the engine did not
    observe how the images were encoded."""
    tower_visual_tokens_dense: float | None
    """Visual tokens that stand for patches; the tower runs on all of them if no stage works inside it."""
    flops: float
    """Multiply-adds of all decoder layers in the prefill."""
    flops_dense: float
    """Multiply-adds of the prefill with every visual token in every layer."""
    kv_bytes: float
    """KV bytes of all layers after the prefill and its `decode_cache` stages, in the dtype of the hidden states."""
    kv_bytes_dense: float
    """KV bytes after the prefill with every visual token in every layer."""
    steps: int
    """Tokens fed since the prefill, in the answer and in later text turns.

    `generate` never feeds the last token that it returns, and rejected drafts do not count.
    """
    kv_bytes_end: float
    """KV bytes held now, at the end of the answer; after its last forward if the cache no longer exists, or no longer
    holds the prompt because it was emptied."""
    kv_bytes_end_dense: float
    """KV bytes at the end with every visual token in every layer and nothing evicted."""
    kv_entries_over_time: tuple[float, ...]
    """Total KV entries of all layers after the prefill and after each later forward, with evictions applied."""
    kv_entries_read_over_time: tuple[float, ...]
    """Total tokens that all layers attend to in each forward after the prompt, parked entries left out."""
    kv_bytes_read: float
    """KV bytes that a forward after the prompt reads in all layers, as the mean over these forwards."""
    average_visual_tokens_answer: float
    """Visual tokens that a layer attends to, averaged over all layers and over the forwards of prompt and answer.

    The prefill counts once, with the visual tokens live in each layer; every later forward counts once, with the visual
    entries that each layer's cache held when it began, or those of them that it read. Both include visual tokens of
    earlier turns.
    """
    overlap: str | None = None
    """Whether images were encoded beside the text layers or before them, and then why.

    `None` without `overlap`, and for a prompt that begins with a prefix.
    """

    def plot(self) -> Figure:
        """Draw visual tokens and KV entries per layer; raises `ImportError` without the `figures` extra."""
        return report_view.figure(self)

    def __repr__(self) -> str:
        return report_view.line(self)

    def __str__(self) -> str:
        """A table with one row per layer, followed by the totals."""
        return report_view.table(self)

    def _repr_html_(self) -> str:
        return report_view.html(self)

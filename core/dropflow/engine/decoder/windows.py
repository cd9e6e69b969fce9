"""Sliding windows that a kernel enforces itself: FlashAttention counts the entries it gets, not logical tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from dropflow.engine.decoder.places import first_drop
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.errors import UnsupportedCall

if TYPE_CHECKING:
    from dropflow.engine.decoder.site import Site
    from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer
    from dropflow.engine.tokens.prompt import Prompt
    from dropflow.engine.tokens.shared_entries import FlowShared
    from dropflow.lifecycle.stage import Window


def check_prompt_windows(site: Site, prompt: Prompt, window: Window, length: int) -> None:
    """Raise `UnsupportedCall` if tokens may be dropped before a layer whose kernel counts them for its window.

    `length` counts the tokens of the call and of earlier ones. Nothing is refused where a window holds all of them.
    """
    first = first_drop(site.plan, prompt, window)
    for layer, size in site.windows.items():
        if layer >= first:
            _check(site, layer, size, length)


def check_continued_windows(site: Site, held: Mapping[int, FlowLayer | UniformLayer | FlowShared], tokens: int) -> None:
    """Raise `UnsupportedCall` if a text-only call of several tokens needs windows over caches that lack tokens.

    A call of one token gets a mask instead (`within_window`).
    """
    for layer, size in site.windows.items():
        index = held[layer].index if layer in held else None
        if index is not None and not index.complete:
            _check(site, layer, size, int(held[layer].length) + tokens)


def within_window(mask: Tensor | None, index: KeyIndex, length: int, window: int) -> Tensor | None:
    """The mask (batch, entries) of one query per sample, with entries outside a window of logical tokens hidden.

    `index` describes the explicit entries of the layer's cache and `length` counts logical tokens, the query included.
    """
    if length <= window:
        return mask
    inside = index.upto(length).logical >= length - window
    if mask is None:
        return inside
    return mask * inside.to(mask.device, mask.dtype)


def _check(site: Site, layer: int, window: int, length: int) -> None:
    if length > window:
        raise UnsupportedCall(
            f"layer {layer}: {site.implementation!r} counts the entries it gets for its sliding window of {window}, so "
            f"that pruning would widen it, and there are {length} tokens; load the model with 'sdpa' or 'eager'"
        )

"""What observers are told: one frozen event after each thing the engine applied. Letters as in `payloads.py`.

Nothing here is made, and no scores are read, unless a stage of the policy implements the hook that gets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from dropflow.backbone.image_layout import ImageLayout
    from dropflow.engine.tokens.prompt import Prompt
    from dropflow.lifecycle.cache_payloads import CacheView
    from dropflow.lifecycle.payloads import Encode
    from dropflow.lifecycle.stage import EncodeBoundary, Window


@dataclass(frozen=True)
class EncodeStep:
    """What one stage decided at one boundary of the vision encoder, or on its output."""

    boundary: EncodeBoundary
    """As in `EncodeCall.boundary`: `None` for the projected output before the LLM."""
    stage: str
    """Its name in the policy."""
    before: tuple[Int[Tensor, "rows"], ...]
    """For each row that the stage saw, which of the image's patches it stood for."""
    answer: Encode
    """What it answered; protected rows stay whatever its `keep` says."""
    places: tuple[Int[Tensor, "rows"], ...]
    """Patches of the rows after the decision, in the numbers of `before`."""
    protected: tuple[Bool[Tensor, "rows"], ...]
    """Which of these no stage may drop from here on."""


@dataclass(frozen=True)
class EncodeEvent:
    """What became of the images of one call of the vision encoder."""

    modality: str
    """`image` or `video`."""
    layouts: tuple[ImageLayout, ...]
    """Every image of the call: its grid, and its rows that are no patches."""
    steps: tuple[EncodeStep, ...]
    """Decisions in the order they were applied."""
    prefix: int
    """Prefix rows of the encoder, such as CLS, that the LLM gets before an image's patches: inside the encoder
    patches are numbered without them, on its output with them."""


@dataclass(frozen=True)
class BoundaryEvent:
    """What was applied at one LLM boundary."""

    boundary: int
    """Where it acted."""
    stages: tuple[str, ...]
    """Names, in the policy, of the stages that were asked to prune here."""
    window_edge_by: tuple[str, ...]
    """Names of the stages by which vision enters or exits here."""
    window: Window
    """Where vision enters and exits in this call."""
    prompt: Prompt
    """Which tokens of this call are visual, padding, dropped by the encoder, or protected."""
    live: Bool[Tensor, "batch tokens"]
    """Tokens of this call that are live before this layer."""
    image_id: Int[Tensor, "batch tokens"]
    """Image number of visual tokens; -1 for text and padding."""
    index: Int[Tensor, "batch slots"]
    """Logical index of the token in each slot that the stages were shown, for `scores` and `keeps`."""
    scores: Mapping[str, Float[Tensor, "batch slots"]]
    """Scores the stages gave with their decisions, by stage name, over the slots before the boundary."""
    keeps: Mapping[str, Bool[Tensor, "batch slots"]]
    """What each stage answered, by stage name; text and protected tokens stay whatever it says."""
    merged_into: Int[Tensor, "batch tokens"] | None = None
    """Logical index of the token in whose place each one's state is from here on, merged with all others that go
    there; its own for most, `None` without merging."""
    merged_by: str | None = None
    """Name of the stage that merged."""


@dataclass(frozen=True)
class Eviction:
    """What one stage decided about the cache of one layer."""

    stage: str
    """Its name in the policy."""
    layer: int
    """Number of the decoder layer."""
    index: Int[Tensor, "batch keys"]
    """Logical index of the entries that were held before."""
    kept: Bool[Tensor, "batch keys"]
    """Which of them stayed: text and protected entries among them."""
    notes: Float[Tensor, "batch keys"] | None
    """What the stage noted of each entry with this answer (`CacheKeep.memory`)."""


@dataclass(frozen=True)
class CacheEvent:
    """What the caches hold after one call: the prefill (`step` 0), or a decode step."""

    step: int
    """Tokens generated since the prefill."""
    evictions: tuple[Eviction, ...]
    """Decisions of `decode_cache` stages in this call, in the order they were applied."""
    layers: tuple[CacheView, ...]
    """What each layer's cache holds now."""

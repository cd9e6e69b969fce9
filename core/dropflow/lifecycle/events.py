"""The frozen events that observers receive after the engine has acted; letters in shapes are those of `payloads.py`.

No event is built, and no scores are read, unless a stage of the policy implements the hook that receives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from dropflow.backbone.image_layout import ImageLayout
    from dropflow.engine.tokens.prompt import Prompt
    from dropflow.lifecycle.cache_payloads import CacheView
    from dropflow.lifecycle.payloads import Encode
    from dropflow.lifecycle.stage import EncodeBoundary, Window


@dataclass(frozen=True)
class EncodeStep:
    """What one stage decided at one boundary of the vision encoder, or on its output."""

    boundary: EncodeBoundary
    """As in `EncodeCall.boundary`: `pixels` for before the encoder, `None` for the projected output before the LLM."""
    stage: str
    """The stage's name in the policy."""
    before: tuple[Int[Tensor, "rows"], ...]
    """For each row that the stage saw, which of the image's patches it stood for."""
    answer: Encode
    """The stage's decision; protected rows stay whatever its `keep` says."""
    places: tuple[Int[Tensor, "rows"], ...]
    """For each row after the decision, which patch it stands for, numbered as in `before`."""
    protected: tuple[Bool[Tensor, "rows"], ...]
    """Which of the rows after the decision no later stage may drop."""


@dataclass(frozen=True)
class EncodeEvent:
    """What became of the images of one call of the vision encoder."""

    modality: str
    """`image` or `video`."""
    layouts: tuple[ImageLayout, ...]
    """Layout of each image of the call: its grid, and its rows that are not patches."""
    steps: tuple[EncodeStep, ...]
    """Decisions in the order they were applied."""
    prefix: int
    """Prefix rows of the encoder, such as CLS, that the LLM gets before an image's patches: inside the encoder
    patches are numbered without them, on its output with them."""
    videos: tuple[tuple[int, ...], ...] = ()
    """For each video, the numbers of its frames among the images, in the order of time, as far as they are known."""


@dataclass(frozen=True)
class BoundaryEvent:
    """What was applied at one LLM boundary."""

    boundary: int
    """The boundary at which the engine acted."""
    stages: tuple[str, ...]
    """Names, in the policy, of the stages that were asked to prune here."""
    window_edge_by: tuple[str, ...]
    """Names of the stages that make vision enter or exit here."""
    window: Window
    """Where vision enters and exits in this call."""
    prompt: Prompt
    """Which tokens of this call are visual, padding, dropped by the encoder, or protected."""
    live: Bool[Tensor, "batch tokens"]
    """Tokens of this call that are live before this layer."""
    image_id: Int[Tensor, "batch tokens"]
    """Image number of visual tokens; -1 for text and padding."""
    index: Int[Tensor, "batch slots"]
    """Logical index of the token in each slot that the stages saw; `scores` and `keeps` have these slots."""
    scores: Mapping[str, Float[Tensor, "batch slots"]]
    """Scores the stages gave with their decisions, by stage name, over the slots before the boundary."""
    keeps: Mapping[str, Bool[Tensor, "batch slots"]]
    """Keep mask of each stage, by stage name; text and protected tokens stay whatever it says."""
    merged_into: Int[Tensor, "batch tokens"] | None = None
    """For each token, logical index of the token into which its state is merged or moved at this boundary; its own
    where it is neither, `None` if no stage merged."""
    merged_by: str | None = None
    """Name of the stage that merged."""
    notes: Mapping[str, Float[Tensor, "batch ..."]] = field(default_factory=dict)
    """What stages noted about each sample at this boundary (`Keep.notes`), by stage name."""


@dataclass(frozen=True)
class Eviction:
    """What one stage decided about the cache of one layer."""

    stage: str
    """The stage's name in the policy."""
    layer: int
    """Number of the decoder layer."""
    index: Int[Tensor, "batch keys"]
    """Logical index of each entry that the cache held before."""
    kept: Bool[Tensor, "batch keys"]
    """Which of these entries stayed, text and protected ones included."""
    notes: Float[Tensor, "batch keys"] | None
    """The stage's note about each entry, given with this decision (`CacheKeep.memory`)."""


@dataclass(frozen=True)
class CacheEvent:
    """What the caches hold after one call: the prefill (`step` 0), or a decode step."""

    step: int
    """Tokens generated since the prefill."""
    evictions: tuple[Eviction, ...]
    """Decisions of `decode_cache` stages in this call, in the order they were applied."""
    layers: tuple[CacheView, ...]
    """What each layer's cache holds now."""
    read: Mapping[int, Bool[Tensor, "batch length"]] = field(default_factory=dict)
    """Decoder layer -> logical tokens whose entries it read in this decode step, for layers that did not read all."""
    read_by: tuple[str, ...] = ()
    """Names, in the policy, of the stages that have chosen what this step reads."""

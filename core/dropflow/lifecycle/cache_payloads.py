"""What `decode_cache` receives and returns; `payloads.py` explains the letters in shapes and the imports of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dropflow.lifecycle.asked_rows import asked_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from dropflow.lifecycle.payloads import RowAttention

    Logits = Callable[[], Float[Tensor, "batch heads keys"]]


@dataclass(frozen=True)
class CacheView:
    """What one decoder layer's KV cache holds."""

    layer: int
    """Number of the decoder layer."""
    index: Int[Tensor, "batch keys"]
    """Logical index of each entry."""
    valid: Bool[Tensor, "batch keys"]
    """False for entries that are padding."""
    image_id: Int[Tensor, "batch keys"]
    """Image number of visual entries, over all turns; -1 for text, generated tokens and padding."""
    protected: Bool[Tensor, "batch keys"]
    """Entries an `encode` stage protects: they stay whatever the answer says."""
    same_as: int
    """The first layer that holds the same entries: this layer's own number, unless an earlier layer shares them."""
    memory: Tensor | None
    """The stage's last note about each entry (batch, keys); 0 for entries that came later, `None` before any note."""


@dataclass(frozen=True)
class CacheCall:
    """Payload of `decode_cache`: the caches of layers with attention, after prefill (`step` 0) or at a decode step."""

    step: int
    """Tokens generated since the prefill."""
    tokens: int
    """Tokens of this call: one while decoding, more where drafts are verified or a turn of text is read."""
    length: int
    """Logical tokens seen, this call's included: every `CacheView.index` is below it."""
    images: int
    """Images seen: every `CacheView.image_id` is below it."""
    layers: tuple[CacheView, ...]
    """The cache of every decoder layer with attention, ascending; `CacheView.layer` says which it is."""
    attention: RowAttention
    """Called by `attention_rows`."""

    @property
    def last_rows(self) -> Int[Tensor, "batch 1"]:
        """The last token of each sample in this call, padding excluded, as `attention_rows` takes it."""
        import torch

        distinct = [view for view in self.layers if view.same_as == view.layer]
        last = [view.index.masked_fill(~view.valid, -1).amax(1, keepdim=True) for view in distinct]
        return torch.stack(last).amax(0) - (self.length - self.tokens)

    def attention_rows(self, layer: int, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows keys"]:
        """Attention probabilities of a few tokens of this call, for a layer the stage lists in `taps`.

        `rows` number the call's tokens from 0 to `tokens - 1`, whatever was dropped (see `last_rows`); a token that was
        not live in the layer gets the row of the last live token before it. Keys are the entries of the layer's
        `CacheView`, as the layer's own attention saw them: entries that an earlier stage evicted in this call are
        missing, and the others keep their share. Raises `DecisionError` for a layer or rows that are not there.
        """
        with asked_rows(layer, rows, len(self.layers[0].index), self.tokens, "(batch, rows)") as rows:
            return self.attention(layer, rows)


@dataclass(frozen=True)
class CacheKeep:
    """Decision of `decode_cache`."""

    keep: Mapping[int, Bool[Tensor, "batch keys"]]
    """Layer -> entries that stay; layers left out are untouched, and text and protected entries always stay."""
    memory: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> a note, one number, about each entry (batch, keys), which the stage gets back when it is next asked.

    Notes are kept with the cache, so that they follow their entries through evictions, crops and beams, and calls of
    other conversations never see them.
    """


@dataclass(frozen=True)
class StepCall:
    """Payload of `decode_cache` at a layer in `decode_reads_at`: a decode step is about to attend in this layer.

    Asked in every forward of one token per sample that follows a prompt with images. The new token's own entry is the
    last one.
    """

    step: int
    """Tokens generated since the prefill, this one included."""
    view: CacheView
    """What the layer's cache holds; its `memory` is `None`."""
    images: int
    """Images seen: every `CacheView.image_id` is below it."""
    scores: Logits
    """Called by `logits`."""

    @property
    def layer(self) -> int:
        """Number of the decoder layer."""
        return self.view.layer

    @property
    def visual(self) -> Bool[Tensor, "batch keys"]:
        """Entries that may be parked: visual and not protected."""
        return (self.view.image_id >= 0) & ~self.view.protected

    def logits(self) -> Float[Tensor, "batch heads keys"]:
        """What the layer's softmax gets for the new token, float32: q k times the layer's scaling, capped and masked.

        -inf, or about the smallest number of the model's dtype, for entries that the layer's mask hides.
        """
        return self.scores()


@dataclass(frozen=True)
class CacheSelect:
    """Decision of `decode_cache` at a layer in `decode_reads_at`: which entries this step reads from there on.

    Nothing is evicted. Later layers read the entries of the same tokens; visual tokens that only they hold are not
    read. At another layer of the same step a stage may choose again, which replaces its choice in the layers from which
    on the new one holds; where several stages choose, an entry is read if all of them want it.
    """

    active: Bool[Tensor, "batch keys"]
    """Entries that are read; text and protected entries always are, padding never is."""
    from_layer: int | None = None
    """First layer that reads only these: the layer of the call, if left out, or a later one; the number of layers for
    none."""

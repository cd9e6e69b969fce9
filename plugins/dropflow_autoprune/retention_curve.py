"""A cut after every layer, along a curve of each image's own (AutoPrune)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from dropflow import (
    Budget,
    Encode,
    EncodeCall,
    Forecast,
    Keep,
    PruneCall,
    Stage,
    StageContext,
    StageOptions,
    Tokens,
    hookimpl,
    operators,
)
from dropflow.errors import PolicyError
from dropflow_autoprune.curve import Curve, Recycling, fitted

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

RELEVANCE = 0.3
"""Weight of the text's attention beside the vision encoder's in the first cut, by bits and text token (released)."""


class RetentionCurveOptions(StageOptions):
    """Options of `autoprune/retention-curve`."""

    target: Tokens = Field(
        default=64, description="visual tokens of each image that are left after a layer, on average over all layers"
    )
    x0: float = Field(
        default=14.9, description="layer in the middle of the curve's fall; published for 32 and 40 layers"
    )
    k0: float = Field(default=0.4, ge=0, description="slope of the curve where text and picture share no information")
    gamma: float = Field(default=0.2, ge=0, description="how much a shared bit, summed over heads, flattens the slope")
    amplitude: float = Field(default=0.75, gt=0, le=1, description="largest share of the curve before it is fitted")
    first: float = Field(
        default=2.5, ge=1, description="tokens that stay after the first layer, as a multiple of `target`"
    )
    merge: float = Field(default=0.3, ge=0, le=1, description="share of the dropped tokens that is clustered")
    cluster: int = Field(default=10, ge=1, description="clustered tokens for every cluster, about")
    layer: int = Field(
        default=-2,
        description="vision encoder layer whose attention counts in the first cut, where the backbone shows it; "
        "negative ones count from its end. In a tower with windowed layers, name one without",
    )


@dataclass(frozen=True)
class FirstCut(Budget):
    """What is left of an image after the first layer: a multiple of the target, rounded down."""

    target: Budget = field(default_factory=Budget)
    times: float = 1.0

    def of(self, visual_tokens: int) -> int:
        """Tokens that stay of an image with `visual_tokens` tokens at entry."""
        return min(int(self.times * self.target.of(visual_tokens)), visual_tokens)


class RetentionCurve(Stage[RetentionCurveOptions]):
    """After each layer the tokens stay that the text attends to most, as many as a curve of the image's own says.

    After the first layer `first` times the target stay, by the text's attention, weighted with the mutual information
    of text and picture in this layer, and the vision encoder's. The information in the second layer sets the slope of
    the curve (see `curve.py`): the more text and picture share, the flatter. The curve is fitted so that the tokens
    after all layers come to the target on average, and noted for the later boundaries. Of the tokens that go after the
    second layer and later, the best `merge` are clustered by density peaks, and each cluster's mean takes the place of
    its centre, which stays. Text is what follows the first image, up to the last instruction token, template included;
    a sample without is not pruned.

    Each image has a curve of its own; the released code takes one image and counts others as text. A layer runs on
    what is left after the one before, so that the average over what layers run on, as reports tell it, is larger: the
    first layer sees every token. Where the released fit is capped and leaves fewer tokens than the target, this one is
    not. Merged tokens keep the index and the position of their centres, where the released code puts them after the
    others and renumbers all; its random noise between equal densities is left out. Without attention of the vision
    encoder the first cut goes by the text alone; on towers without CLS it counts what a patch gets from all others.
    Protected tokens stay and count. Noted are, for each image, the tokens after the first cut, the slope, and the
    fitted factor.
    """

    Options = RetentionCurveOptions
    summary = "a cut after every layer, along a curve whose slope follows from what text and picture share"
    paper = "AutoPrune, code AutoLab-SAI-SJTU/AutoPrune"
    example: ClassVar[Mapping[str, Any]] = {"target": 0.3, "x0": 2.5, "k0": 1.2, "first": 2.0, "cluster": 2}

    def __init__(self, options: RetentionCurveOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._budget = context.scale.tokens(options.target, context.path("target"))
        self._first_cut = FirstCut(target=self._budget, times=options.first)
        self._recycling = Recycling(options.merge, options.cluster)
        window = context.window
        self._boundaries = tuple(range(window.entry + 1, window.exit))
        if len(self._boundaries) < 2:
            raise PolicyError(
                f"stages.{context.name}: needs three layers with vision, but it takes part in layers {window.entry} to "
                f"{window.exit - 1}; let it enter earlier or leave later"
            )
        layers = window.exit - window.entry
        self._curve = Curve(layers, options.x0, options.k0, options.gamma, options.amplitude)
        self._seen = context.provides("vision_attention")

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers before the boundaries."""
        return tuple(boundary - 1 for boundary in self._boundaries)

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """The layer of the vision encoder that counts in the first cut, where the backbone shows it."""
        return (self.options.layer,) if self._seen else ()

    @property
    def carries(self) -> int:
        """The vision encoder's attention to each token."""
        return int(self._seen)

    @property
    def encode_at(self) -> tuple[None, ...]:
        """After the projector, where the vision encoder's attention is known for every token."""
        return (None,) if self._seen else ()

    def forecast(self) -> Forecast:
        """The first cut; then the data decides."""
        keeps: dict[int, Budget | None] = dict.fromkeys(self._boundaries)
        return Forecast(keeps=keeps | {self._boundaries[0]: self._first_cut})

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Let every token carry the vision encoder's attention to it."""
        import torch

        layer = self.options.layer
        with torch.no_grad():
            scores = call.cls_attention(layer) if call.has_cls else call.received_attention(layer)
        carry = (own.float().to(rows.device)[:, None] for own, rows in zip(scores, call.features, strict=True))
        return Encode(carry=tuple(carry))

    @hookimpl
    def prune(self, call: PruneCall) -> Keep | None:
        """Keep what the text attends to, image by image, and clusters of what goes."""
        import torch

        rows, asks = operators.text_rows(call)
        if not rows.shape[1]:
            return None
        number = self._boundaries.index(call.boundary)
        with torch.no_grad():
            received = _received(call, rows, asks)
            texts = asks.sum(1).clamp(min=1)[:, None]
            scores = received.mean(1) / texts
            if number < 2:
                bits = self._bits(call, rows, asks, received)
            if number == 0:
                scores = RELEVANCE * bits / texts * scores
                scores = scores if call.carried is None else scores + call.carried[..., 0]
                return self._first(call, scores, asks.any(1))
            notes = call.notes[self.context.name].clone()
            if number == 1:
                self._fit(call, notes, bits)
            return self._later(call, scores, asks.any(1), notes, number)

    def _first(self, call: PruneCall, scores: Float[Tensor, "batch slots"], asks: Bool[Tensor, "batch"]) -> Keep:
        """The first cut, after which each image's number of tokens is noted."""
        import torch

        counts = [self._first_cut.of(size) for size in call.image_sizes]
        keep = operators.keep_top(scores.masked_fill(call.protected, torch.inf), call.image_id, counts)
        notes = torch.zeros(len(keep), len(counts), 3, device=keep.device)
        notes[..., 0] = torch.tensor(counts, device=keep.device)
        return Keep(keep | ~asks[:, None], scores, notes=notes)

    def _bits(
        self,
        call: PruneCall,
        rows: Int[Tensor, "batch rows"],
        asks: Bool[Tensor, "batch rows"],
        received: Float[Tensor, "batch heads slots"],
    ) -> Float[Tensor, "batch slots"]:
        """Mutual information of the text and the image of each slot, summed over heads."""
        import torch

        from dropflow_autoprune.curve import information

        texts = asks.sum(1).clamp(min=1)[:, None, None, None]
        by_slot = torch.zeros_like(received)
        for part in operators.row_parts(call, call.boundary - 1, rows, asks):
            by_slot += information(part.float(), received, texts)
        group, images = call.image_id.clamp(min=-1) + 1, len(call.image_sizes) + 1
        sums = by_slot.new_zeros(len(group), images).scatter_add(1, group, by_slot.sum(1))
        return sums.gather(1, group)

    def _fit(self, call: PruneCall, notes: Float[Tensor, "batch images 3"], bits: Float[Tensor, "batch slots"]) -> None:
        """Note the slope of each image's curve and the factor that fits it."""
        import torch

        for sample, image, own in _images(call):
            slope = self._curve.slope(float(bits[sample, own[0]]))
            first, target = int(notes[sample, image, 0]), self._budget.of(call.image_sizes[image])
            factor = fitted(first, self._curve.shares(slope), target, self._recycling)
            notes[sample, image, 1:] = torch.tensor([slope, factor])

    def _later(
        self,
        call: PruneCall,
        scores: Float[Tensor, "batch slots"],
        asks: Bool[Tensor, "batch"],
        notes: Float[Tensor, "batch images 3"],
        number: int,
    ) -> Keep:
        """Of each image as many tokens as its curve says, and clusters of the others."""
        import math

        import torch

        into = torch.arange(scores.shape[1], device=scores.device).repeat(len(scores), 1)
        keep = torch.ones_like(call.valid)
        noted, asking = notes.tolist(), asks.tolist()
        for sample, image, own in _images(call):
            if not asking[sample]:
                continue
            first, slope, factor = noted[sample][image]
            share = torch.tensor(factor * self._curve.shares(slope)[number - 1])
            count = max(0, math.ceil(float((first - 1) * share)))  # in float32, as released
            ranked = scores[sample].masked_fill(call.protected[sample], torch.inf)[own]
            order = own[torch.sort(ranked, descending=True, stable=True).indices]
            gone = order[count:][~call.protected[sample][order[count:]]]
            keep[sample, gone] = False
            pool, made = self._recycling.of(len(gone))
            if made:
                centres, cluster = operators.density_peaks(call.hidden[sample, gone[:pool]], made, made)
                into[sample, gone[:pool]] = gone[centres][cluster]
                keep[sample, gone[centres]] = True
        return Keep(keep, scores, notes=notes, merge_into=into)


def _images(call: PruneCall) -> Iterator[tuple[int, int, Int[Tensor, "own"]]]:
    """Sample, number and slots of every image that has live tokens."""
    for image in range(len(call.image_sizes)):
        where = (call.image_id == image).nonzero()
        if len(where):
            yield int(where[0, 0]), image, where[:, 1]


def _received(
    call: PruneCall, rows: Int[Tensor, "batch rows"], asks: Bool[Tensor, "batch rows"]
) -> Float[Tensor, "batch heads slots"]:
    """What the text attends to in the layer before the boundary, summed over its tokens."""
    import torch

    found = torch.zeros(())
    for part in operators.row_parts(call, call.boundary - 1, rows, asks):
        found = found.to(part.device) + part.float().sum(2)
    return found

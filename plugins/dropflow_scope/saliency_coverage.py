"""Saliency and coverage: the tokens of each image that together cover it, the salient ones first (SCOPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dropflow import Encode, EncodeBoundary, EncodeCall, Forecast, Stage, StageContext, StageOptions, Tokens, hookimpl

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SaliencyCoverageOptions(StageOptions):
    """Options of `scope/saliency-coverage`."""

    keep: Tokens = Field(default=64, description="visual tokens of each image that stay; published are 64, 128 and 192")
    alpha: float = Field(
        default=1.0,
        ge=0,
        description="exponent of the saliency; 0 leaves coverage alone to decide, and reads no attention",
    )
    combine: Literal["multi", "add"] = Field(
        default="multi", description="whether saliency multiplies what a token adds to the coverage, or is added to it"
    )
    fill: Literal["index", "attention"] = Field(
        default="index",
        description="which tokens fill up once all is covered: the first, as released, or the most salient",
    )
    layer: int = Field(
        default=-2,
        description="vision encoder layer whose attention is the saliency; negative ones count from its end. The "
        "published one (22 of 24) is the layer whose output the LLM gets. In a tower with windowed layers, name one "
        "without",
    )
    at: Literal["features", "output"] | None = Field(
        default=None,
        description="`features`: what the projector gets, as published; `output`: the projected features, for towers "
        "whose patches are pooled, shuffled or joined; left out, `features` where the backbone has that place",
    )


class SaliencyCoverage(Stage[SaliencyCoverageOptions]):
    """Of each image, tokens stay that cover all others, by cosine, and that the vision encoder attends to.

    The choice is greedy (see `coverage.py`): again and again the token stays whose gain in coverage, times its
    saliency, is largest. Saliency is the attention from CLS in one layer, summed over heads; on towers without a CLS
    token it is the attention a patch gets from all of them. Tokens keep their values, their order and, before the LLM,
    their positions as the policy says.

    Each image (tile, frame) has the whole budget, whatever else is in the call, where the released code divides one
    budget by the images in a call; an image with fewer tokens keeps all, and one with a row of zeros is chosen from
    like any other, where the released code repeats the first token or gets NaN. On the projected features (`at:
    output`) a token's saliency is the mean over its patches, and of a picture in tiles the overview and the joined
    tiles are one image each. Rows that an earlier stage protects stay on top of the number. Work and memory grow with
    the square of an image's tokens: 64 MB for 4,096.
    """

    Options = SaliencyCoverageOptions
    summary = "tokens stay that cover what the image shows, those first that the vision encoder attends to"
    paper = "SCOPE, code kinredon/SCOPE"
    example: ClassVar[Mapping[str, Any]] = {"keep": 0.4}
    needs = frozenset({"vision_attention"})

    def __init__(self, options: SaliencyCoverageOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._budget = context.scale.tokens(options.keep, context.path("keep"))
        if not options.alpha:
            self.needs = frozenset()

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """On what the projector gets, or on what it gives."""
        return (self.context.features_place(self.options.at),)

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """The layer whose attention is the saliency; none where its exponent is 0."""
        return (self.options.layer,) if self.options.alpha else ()

    def forecast(self) -> Forecast:
        """The budget."""
        return Forecast(encoded=self._budget)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Keep the rows of every image that are chosen."""
        import torch

        from dropflow_scope.coverage import greedy

        masks, options = [], self.options
        with torch.no_grad():
            scores = self._saliency(call)
            for features, saliency in zip(call.features, scores, strict=True):
                count = self._budget.of(len(features))
                saliency = saliency.to(features.device)
                chosen = greedy(
                    features, saliency, count, alpha=options.alpha, combine=options.combine, fill=options.fill
                )
                mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
                masks.append(mask.index_fill(0, chosen, True))
        return Encode(keep=tuple(masks), scores=lambda: scores)

    def _saliency(self, call: EncodeCall) -> tuple[Float[Tensor, "rows"], ...]:
        """Attention to each row, summed over heads; 1 where its exponent is 0."""
        if not self.options.alpha:
            return tuple(features.new_ones(len(features)) for features in call.features)
        layer = self.options.layer
        means = call.cls_attention(layer) if call.has_cls else call.received_attention(layer)
        heads = call.tower(layer).parts[0].whole().query.shape[1]
        return tuple(own * heads for own in means)

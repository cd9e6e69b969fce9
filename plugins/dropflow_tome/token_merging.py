"""Token merging inside the vision tower: in every layer the most similar tokens become one (ToMe)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dropflow import (
    Budget,
    Encode,
    EncodeBoundary,
    EncodeCall,
    Forecast,
    Stage,
    StageContext,
    StageOptions,
    hookimpl,
    operators,
)
from dropflow_tome.schedule import schedule


class TokenMergingOptions(StageOptions):
    """Options of `tome/token-merging`."""

    r: NonNegativeInt | list[NonNegativeInt] = Field(
        default=8, description="tokens merged away in each layer, as one number or layer by layer"
    )
    slope: float = Field(
        default=0.0,
        ge=-1,
        le=1,
        description="tilts a single `r`: at -1 it falls from twice as many in the first layer to none in the last, "
        "which is faster and coarser; at 1 it rises",
    )
    layers: PositiveInt = Field(
        default=23,
        le=1_000,
        description="layers that merge, from the first on; the default are those before LLaVA's features (23 of "
        "24), since a later one changes nothing",
    )
    proportional: bool = Field(
        default=True,
        description="whether attention counts a merged token as often as it has members; needs 'sdpa' or 'eager'. "
        "Published towers that were not trained with merging need it",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.r, list) and (len(self.r) > self.layers or self.slope):
            raise ValueError(f"expected `r` as a list of at most {self.layers} numbers (see `layers`), without `slope`")
        return self


class TokenMerging(Stage[TokenMergingOptions]):
    """Between attention and feed-forward part of a layer, the r most similar pairs of tokens become one token each.

    Tokens at even places are compared with those at odd places, CLS excepted, by the cosine of this layer's keys (mean
    over heads); the r tokens with the best match join it. A merged token is the mean of all its members, and attention
    of later layers adds the logarithm of their number to its logits. The tower's feed-forward part and all later layers
    run on fewer tokens. Unmerged tokens come first, then the matches: this order, not the raster, fills the image's
    first placeholders. Each image is matched on its own, which changes nothing of the published rule. A zero key has
    cosine 0 with all others, where the released code merges its token first.
    """

    Options = TokenMergingOptions
    summary = "in every layer of the vision tower the most alike tokens become one"
    paper = "arXiv:2210.09461, section 3"
    example: ClassVar[Mapping[str, Any]] = {"r": 3, "layers": 2}
    needs = frozenset({"sublayers", "vision_layers"})

    def __init__(self, options: TokenMergingOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._r = schedule(options.layers, options.r, options.slope)

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """Inside every layer that merges."""
        return tuple(layer + 0.5 for layer in self.vision_taps)

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """The layers that merge, whose keys decide."""
        return tuple(layer for layer, count in enumerate(self._r) if count)

    def forecast(self) -> Forecast:
        """Tokens left after the last layer; at most half of an image's tokens go in one layer."""
        tokens = self.context.scale.target.visual_tokens
        if tokens is None:
            return Forecast(encoded="data")
        for count in self._r:
            tokens -= min(count, tokens // 2)
        return Forecast(encoded=Budget(tokens=tokens))

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Merge tokens of every image."""
        import torch

        from dropflow_tome.matching import match, merge, shares

        assert isinstance(call.boundary, float)
        layer, prefix = int(call.boundary), call.prefix
        with torch.no_grad():
            matchings = [
                match(keys.mean(0), self._r[layer], has_cls=call.has_cls) for _, keys in call.query_keys(layer)
            ]
        weights = [torch.cat((own.new_ones(prefix), own)) for own in call.sizes]
        tokens = [torch.cat(own) for own in zip(call.prefix_rows, call.features, strict=True)]
        merged = [merge(*each) for each in zip(matchings, tokens, weights, strict=True)]
        rows = tuple(own[prefix:] for own, _ in merged)
        return Encode(
            rows=rows,
            places=operators.first_places(call.places, rows),
            sizes=tuple(sizes[prefix:] for _, sizes in merged),
            proportional=self.options.proportional,
            shares=lambda: tuple(shares(*each, prefix) for each in zip(matchings, weights, strict=True)),
        )

"""SparseVLM+: raters as in SparseVLM, attention without RoPE's pull to near tokens, the best heads, no recycling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Depth, Forecast, Keep, PruneCall, Stage, StageContext, StageOptions, Tokens, hookimpl, operators
from dropflow_sparsevlm.survivors import forecast, images_left


class GravityCorrectedOptions(StageOptions):
    """Options of `sparsevlm/gravity-corrected`."""

    keep: dict[Depth, Tokens] = Field(
        min_length=1,
        description="boundary -> visual tokens per image that survive it, protected ones included; the layer before "
        "it ranks, so that these are the published pruning layers plus one",
    )
    heads: float = Field(
        default=14 / 32,
        gt=0,
        le=1,
        description="share of the heads that rank: those whose corrected attention to the picture is largest; as "
        "published, 14 of 32",
    )
    reference: bool = Field(
        default=False,
        description="do as the released code does: at least one token of an image goes at each boundary, whatever "
        "`keep`, and attention is divided by W whatever its size and sign",
    )


class GravityCorrected(Stage[GravityCorrectedOptions]):
    """At each boundary the tokens survive that the raters attend to most, beyond what their distance explains.

    Raters are those of `sparsevlm/text-guided`. Their attention probabilities in the layer before the boundary are
    divided by W, what RoPE alone makes of the distance (see `gravity.py`; from the cos and sin that this layer was
    given, so for any base, part of a head, or position of several dimensions). Score of a token: mean over raters and
    over the heads that then attend to the sample's visual tokens most. W oscillates at long distances: for base 1e4 it
    is negative from distance 1707 on with 128 dims and from 725 on with 64, where the released code's scores change
    sign. Here it is never taken below 0.05 of what it is at distance 0, a floor that begins earlier, at distance 1109
    with 128 dims and 542 with 64; `reference` takes W as it is. A sample without text after its image is not pruned.
    Raises `PolicyError` where vision takes no part in a ranking layer, and on backbones where a layer may not rotate q
    and k by the cos and sin that it is given.
    """

    Options = GravityCorrectedOptions
    summary = "SparseVLM+: the raters' attention, corrected for distance, in the heads that see the picture best"
    paper = "arXiv:2410.04417, released version 2.0"
    needs = frozenset({"rotary"})
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.4, 0.7: 0.2}}

    def __init__(self, options: GravityCorrectedOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._keeps = context.budgets("keep", options.keep)
        context.check_layer_before("keep", self._keeps)

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers before the boundaries."""
        return tuple(boundary - 1 for boundary in self._keeps)

    def forecast(self) -> Forecast:
        """The survivors."""
        return forecast(self._keeps, at_least_one_goes=self.options.reference)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep | None:
        """Keep what the raters attend to beyond what distance explains."""
        import torch

        from dropflow_sparsevlm.gravity import best_heads, corrected_attention
        from dropflow_sparsevlm.rating import rater_rows

        found = rater_rows(call)
        if found is None:
            return None
        rows, asks = found
        budget, goes = self._keeps[call.boundary], int(self.options.reference)
        with torch.no_grad():
            attention = corrected_attention(call, rows, asks, guard=not self.options.reference)
            by_head = attention / asks.sum(1).clamp(min=1)[:, None, None]
            scores = best_heads(by_head, call.image_id >= 0, self.options.heads)
        counts = [
            max(0, min(budget.of(size), left - goes))
            for size, (_, left) in zip(call.image_sizes, images_left(call), strict=True)
        ]
        best = operators.keep_top(scores.masked_fill(call.protected, torch.inf), call.image_id, counts)
        return Keep(best | ~asks.any(1, keepdim=True), scores)

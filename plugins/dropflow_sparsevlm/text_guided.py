"""Text-guided pruning: the text tokens that have to do with the picture rate its tokens, and the rest is recycled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from dropflow import (
    Budget,
    Depth,
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
from dropflow_sparsevlm.survivors import forecast, images_left, recycled

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class RankBudget(StageOptions):
    """How many tokens stay, by the rank of the raters' attention to an image."""

    at: list[Depth] = Field(min_length=1, description="boundaries to prune at, the published layers plus one")
    scale: float = Field(gt=0, description="tokens that stay for each rank")
    bias: float = Field(default=0, description="tokens that stay in any case")


class TextGuidedOptions(StageOptions):
    """Options of `sparsevlm/text-guided`."""

    keep: dict[Depth, Tokens] | None = Field(
        default=None,
        min_length=1,
        description="boundary -> visual tokens per image that survive it, protected ones included and clusters not; "
        "the layer before it ranks, so that these are the published pruning layers plus one",
    )
    rank: RankBudget | None = Field(
        default=None,
        description="instead of `keep`: int(scale * rank + bias) tokens of an image survive each boundary, so that the "
        "number follows from picture and question, as in the paper's first version",
    )
    recycle: bool = Field(
        default=True, description="cluster the best of the tokens that go, and keep the mean of every cluster"
    )
    recycle_share: float = Field(default=0.3, gt=0, le=1, description="share of the dropped tokens that is recycled")
    cluster_size: int = Field(default=10, ge=1, description="recycled tokens for every cluster, about")
    reference: bool = Field(
        default=False,
        description="do as the released code does: at least one token of an image goes at each boundary, whatever "
        "`keep`, and clusters follow the survivors of their image, best centre first, for which `recycle` needs "
        "`positions: compact`",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.rank is None):
            raise ValueError("expected either `keep` (a number of tokens) or `rank` (a number that adapts)")
        return self


class TextGuided(Stage[TextGuidedOptions]):
    """At each boundary the tokens that the raters attend to most survive, and clusters of the others join them.

    Raters are the text tokens after the first image, up to the last instruction token, whose embedding has more than
    average to do with the image's embeddings as both enter the LLM. Score of a token: attention probability from the
    raters in the layer before the boundary, mean over heads and raters; the softmax runs over all keys. Of the
    tokens that go, the best 30 % are clustered by density peaks, image by image, and each cluster's mean takes the
    place of its centre, which stays. The released code puts clusters after the survivors, as `reference` does: then
    the tokens left of an image hold its survivors in their order and its clusters after them. It also separates equal
    densities by random numbers below 1e-6 and divides a cluster's sum by its size plus 1e-6, which nothing here does. A
    cluster is a token like any other at later boundaries. A sample without text after its image is not pruned. Raises
    `PolicyError` where vision takes no part in a ranking layer, and for clusters in the released order under
    `positions: persistent`, where a moved token would take a position that is not its own.
    """

    Options = TextGuidedOptions
    summary = "text that has to do with the picture rates its tokens; the best of the dropped live on as clusters"
    paper = "arXiv:2410.04417, section 3"
    example: ClassVar[Mapping[str, Any]] = {"keep": {0.35: 0.4, 0.7: 0.2}, "recycle_share": 0.6, "cluster_size": 2}

    def __init__(self, options: TextGuidedOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._keeps: dict[int, Budget | None]
        if options.rank is None:
            self._keeps = {**context.budgets("keep", options.keep or {})}
        else:
            self._keeps = dict.fromkeys(context.boundaries("rank.at", options.rank.at))
        context.check_layer_before("keep" if options.rank is None else "rank.at", self._keeps)
        if options.reference and options.recycle and context.positions != "compact":
            raise PolicyError(
                f"{context.path('reference')}: the released code puts clusters after the survivors and renumbers both; "
                "set `positions: compact`, `recycle: false`, or leave `reference` out"
            )

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers before the boundaries."""
        return tuple(boundary - 1 for boundary in self._keeps)

    def forecast(self) -> Forecast:
        """Survivors and clusters; with `rank` the data decides."""
        options = self.options
        recycle = (options.recycle_share, options.cluster_size) if options.recycle else None
        return forecast(self._keeps, recycle=recycle, at_least_one_goes=options.reference)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep | None:
        """Keep what the raters attend to, and clusters of the rest."""
        import torch

        from dropflow_sparsevlm.rating import rater_rows

        found = rater_rows(call)
        if found is None:
            return None
        rows, asks = found
        with torch.no_grad():
            parts = [part.float().mean(1) for part in operators.row_parts(call, call.boundary - 1, rows, asks)]
            attention = torch.cat(parts, 1)  # (batch, raters, slots), zero where a sample has fewer raters
            scores = attention.sum(1) / asks.sum(1, keepdim=True).clamp(min=1)
            counts = self._counts(call, attention, asks)
            best = operators.keep_top(scores.masked_fill(call.protected, torch.inf), call.image_id, counts)
            keep = best | ~asks.any(1, keepdim=True)
            return self._with_clusters(call, keep, scores) if self.options.recycle else Keep(keep, scores)

    def _counts(
        self, call: PruneCall, attention: Float[Tensor, "batch raters slots"], asks: Bool[Tensor, "batch raters"]
    ) -> list[int]:
        """Tokens that survive of each image, by image number."""
        from dropflow_sparsevlm.rating import adaptive_count

        budget, rank, counts = self._keeps[call.boundary], self.options.rank, []
        for image, (sample, left) in enumerate(images_left(call)):
            most = left - 1 if self.options.reference else left
            if budget is not None:
                counts.append(max(0, min(budget.of(call.image_sizes[image]), most)))
            elif rank is not None and left and bool(asks[sample].any()):
                block = attention[sample][asks[sample]][:, call.image_id[sample] == image]
                counts.append(adaptive_count(block, rank.scale, rank.bias, most=most))
            else:
                counts.append(left)
        return counts

    def _with_clusters(
        self, call: PruneCall, keep: Bool[Tensor, "batch slots"], scores: Float[Tensor, "batch slots"]
    ) -> Keep:
        """The best of the dropped tokens merged into the centres of their clusters, which stay, or after all others."""
        import torch

        from dropflow.operators import density_peaks

        keep = keep.clone()
        into = torch.arange(keep.shape[1], device=keep.device).repeat(len(keep), 1)
        gone = (call.image_id >= 0) & ~keep & ~call.protected
        for sample, own in enumerate(gone):
            for image in sorted(set(call.image_id[sample, own].tolist())):
                slots = (own & (call.image_id[sample] == image)).nonzero()[:, 0]
                size, count = recycled(len(slots), self.options.recycle_share, self.options.cluster_size)
                slots = slots[torch.sort(scores[sample, slots], descending=True, stable=True).indices[:size]]
                centres, cluster = density_peaks(call.hidden[sample, slots], count, count)
                places = slots[centres]
                if self.options.reference:
                    survivors = (keep[sample] & (call.image_id[sample] == image)).nonzero()[:, 0]
                    ordered = torch.cat((survivors, places)).sort().values
                    into[sample, survivors], places = ordered[: len(survivors)], ordered[len(survivors) :]
                into[sample, slots] = places[cluster]
                keep[sample, slots[centres]] = True
        return Keep(keep, scores, merge_into=into)

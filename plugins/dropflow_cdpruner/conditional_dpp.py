"""A choice of tokens, image by image, that is diverse and relevant to the question (CDPruner, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from dropflow import (
    Depth,
    Encode,
    EncodeBoundary,
    EncodeCall,
    Forecast,
    Keep,
    ModelSource,
    PruneCall,
    Stage,
    StageContext,
    StageOptions,
    Tokens,
    hookimpl,
    operators,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from dropflow import Backbone
    from dropflow.operators import JointSpace


class ConditionalDPPOptions(StageOptions):
    """Options of `cdpruner/conditional-dpp`."""

    keep: Tokens = Field(description="visual tokens of each image that stay, protected ones included")
    clip: ModelSource | None = Field(
        default=None,
        description="folder or hub name of the CLIP model that the vision tower was taken from: relevance is then told "
        "in its joint space, as published, and the questions are to be stated (`dropflow.questions`); without, in the "
        "LLM's own embeddings, on any backbone",
    )
    negate: bool | None = Field(
        default=None,
        description="whether the patches least like the question are the relevant ones, as released for CLIP, whose "
        "patches behave so; by default with `clip` and not without",
    )
    theta: float | None = Field(
        default=None, gt=0, lt=1, description="weight of relevance beside diversity; without, relevance as it is"
    )
    at: Depth = Field(default=0, description="boundary to prune at; 0 is before the LLM, as published")
    reference: bool = Field(
        default=False,
        description="as released: relevance is rescaled over all images of a sample together, and a question too long "
        "for CLIP is cut without start and end tokens of its own",
    )


class ConditionalDPP(Stage[ConditionalDPPOptions]):
    """Of each image, the tokens stay whose kernel L = diag(r) S diag(r) has the largest determinant, chosen greedily.

    S are the cosines of the projected tokens, r their relevance to the question, rescaled to 0..1 in each image. With
    `clip`, relevance is minus the cosine of patch and question in CLIP's joint space (released code: post norm and
    visual projection on the patches that the projector gets; mean over the segments of a long question). Without it
    (our addition, for backbones that have no CLIP tower) it is the mean cosine of the projected token with the
    embeddings of the text tokens after the first image. Where there is no text, or all relevance is equal, diversity
    alone decides. Where fewer tokens are independent than are asked for, the most relevant of the others fill up; the
    released code gets NaN there and keeps fewer. Every image (tile, frame) has a choice of its own.

    Protected tokens stay and count against the number.
    """

    Options = ConditionalDPPOptions
    summary = "tokens stay that are unlike each other and have to do with the question"
    paper = "arXiv:2506.10967, section 3"
    example: ClassVar[Mapping[str, Any]] = {"keep": 0.4}

    def __init__(self, options: ConditionalDPPOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._at = context.scale.boundary(options.at, context.path("at"))
        self._budget = context.scale.tokens(options.keep, context.path("keep"))
        self._space: JointSpace | None = None
        self._negate = options.clip is not None if options.negate is None else options.negate

    def prepare(self, backbone: Backbone) -> None:
        """Load CLIP, if the options name one; raises `PolicyError` if it is no CLIP model, or not that of the tower."""
        from dropflow.operators import JointSpace

        if self.options.clip is not None:
            self._space = JointSpace(self.options.clip, backbone, self.context.path("clip"))

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """With `clip`, what the projector gets: patches of the tower."""
        return () if self.options.clip is None else ("features",)

    @property
    def carries(self) -> int:
        """A vector of the joint space for each patch."""
        return 0 if self._space is None else self._space.width

    @property
    def reads_questions(self) -> bool:
        """With `clip`."""
        return self.options.clip is not None

    @property
    def ranks(self) -> bool:
        """False: it reads no attention."""
        return False

    def forecast(self) -> Forecast:
        """The budget, from the boundary on."""
        return Forecast(keeps={self._at: self._budget})

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Let every patch carry its vector of the joint space; nothing is dropped here."""
        assert self._space is not None
        return Encode(carry=tuple(self._space.patches(features) for features in call.features))

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep a diverse and relevant choice of every image."""
        import torch

        with torch.no_grad():
            scores = torch.full(call.index.shape, torch.nan, device=call.index.device)
            keep = (call.image_id < 0) | call.protected
            for sample, text in enumerate(self._texts(call)):
                self._choose(call, sample, text, keep[sample], scores[sample])
        return Keep(keep | ~call.instruction_valid.any(1, keepdim=True), scores)

    def _texts(self, call: PruneCall) -> list[Float[Tensor, "texts dim"]]:
        """What each sample asks, in the space that `_similarity` compares it in."""
        if self._space is not None:
            assert call.questions is not None
            asked = {q: self._space.text(q, reference=self.options.reference) for q in dict.fromkeys(call.questions)}
            return [asked[question] for question in call.questions]
        rows, asks = operators.text_rows(call)
        index = call.index.gather(1, rows)
        return [embeds[i[real]] for embeds, i, real in zip(call.entry.embeds, index, asks, strict=True)]

    def _choose(self, call: PruneCall, sample: int, text: Tensor, keep: Tensor, scores: Tensor) -> None:
        """Fill in what stays of each image of one sample, and its relevance."""
        import torch

        from dropflow_cdpruner.dpp import greedy_map, rescaled, sharpened

        image, projected = call.image_id[sample], call.entry.embeds[sample, call.index[sample]]
        visual = image >= 0
        numbers = torch.unique(image[visual]).tolist()
        if not numbers:
            return
        similar = torch.zeros(image.shape, device=image.device)
        similar[visual] = self._similarity(call, sample, projected, text).to(similar)[visual]
        low, high = (similar[visual].min(), similar[visual].max()) if self.options.reference else (None, None)
        for number in numbers:
            own = (image == number).nonzero()[:, 0]
            scores[own] = rescaled(similar[own], low, high)
            weight = scores[own] if self.options.theta is None else sharpened(scores[own], self.options.theta)
            held = call.protected[sample, own]
            count = max(0, self._budget.of(call.image_sizes[number]) - int(held.sum()))
            free = own[~held]
            keep[free[greedy_map(projected[free], weight[~held], count)]] = True

    def _similarity(
        self, call: PruneCall, sample: int, projected: Float[Tensor, "slots dim"], text: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "slots"]:
        """How relevant each patch of a sample is to the question; 0 for all where nothing is asked."""
        from dropflow_cdpruner.dpp import mean_cosine

        patches = projected if call.carried is None else call.carried[sample]
        if not len(text):
            return patches.new_zeros(len(patches))
        similar = mean_cosine(patches, text.to(patches.device))
        return -similar if self._negate else similar

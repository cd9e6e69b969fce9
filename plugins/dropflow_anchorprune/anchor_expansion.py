"""Relevant tokens as an anchor, and important ones that are unlike them, image by image (AnchorPrune)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from dropflow import (
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
    from jaxtyping import Bool, Float
    from torch import Tensor

    from dropflow import Backbone
    from dropflow.operators import JointSpace

CORE = 1 / 6.4
"""Share of the tokens that stay that is the core of the anchor in the published settings."""


class AnchorExpansionOptions(StageOptions):
    """Options of `anchorprune/anchor-expansion`."""

    keep: Tokens = Field(description="visual tokens of each image that stay, protected ones included")
    core: Tokens | None = Field(
        default=None,
        description="most relevant tokens of each image that stay in any case; left out, `keep` / 6.4, as published",
    )
    threshold: float = Field(
        default=0.2, description="distance (1 less the cosine) from the core above which a relevant token is news"
    )
    patience: int = Field(default=3, ge=1, description="tokens with news at which the anchor ends, the last included")
    ratio: float = Field(default=0.5, ge=0, le=1, description="share of `keep` that the anchor takes at most")
    clip: ModelSource | None = Field(
        default=None,
        description="folder or hub name of the CLIP model that the vision tower was taken from: relevance is then told "
        "in its joint space, as published for LLaVA, and the questions are to be stated (`dropflow.questions`); "
        "without, by the LLM's own embeddings, as published for Qwen2.5-VL",
    )
    layer: int | None = Field(
        default=None,
        description="vision encoder layer whose attention is the importance; negative ones count from its end. Left "
        "out, the published ones: -2 on towers with a CLS token, the last on others. In a tower with windowed layers, "
        "name one without",
    )


class AnchorExpansion(Stage[AnchorExpansionOptions]):
    """Of each image, tokens stay that the question asks for, and then important ones that are unlike those chosen.

    The anchor are the most relevant tokens: a core, and more by rank until some of them bring news (see `choice.py`).
    Then the token follows, again and again, whose importance times distance to the nearest chosen one is largest.

    Importance is the vision encoder's attention to a token: from CLS, or on towers without one from all patches; where
    a token is made of several patches, their mean. With `clip`, relevance is minus the cosine of patch and question in
    CLIP's joint space (mean over the segments of a long question), the core is compared there, too, and the expansion
    compares what the projector gets. Without, relevance is the largest cosine of the projected token with the embedding
    of a text token after the first image, template included, and the projected tokens are compared.

    Every image (tile, time step) has a choice of its own. The released code takes the importance of all images but the
    first in the order of the tower's windows; here every token has its own. A sample without a question is not pruned.
    Protected tokens stay and count against the number.
    """

    Options = AnchorExpansionOptions
    summary = "the tokens that the question asks for stay, and important ones that are unlike them"
    paper = "AnchorPrune, code MULTI-cau/AnchorPrune"
    example: ClassVar[Mapping[str, Any]] = {"keep": 0.4}
    needs = frozenset({"vision_attention"})

    def __init__(self, options: AnchorExpansionOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._budget = context.scale.tokens(options.keep, context.path("keep"))
        self._core = None if options.core is None else context.scale.tokens(options.core, context.path("core"))
        published = -2 if context.provides("cls") else -1
        self._layer = published if options.layer is None else options.layer
        self._space: JointSpace | None = None

    def prepare(self, backbone: Backbone) -> None:
        """Load CLIP, if the options name one; raises `PolicyError` if it is no CLIP model, or not that of the tower."""
        if self.options.clip is not None:
            self._space = operators.JointSpace(self.options.clip, backbone, self.context.path("clip"))

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """With `clip`, what the projector gets: patches of the tower."""
        return (None,) if self.options.clip is None else ("features",)

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """The layer whose attention is the importance."""
        return (self._layer,)

    @property
    def carries(self) -> int:
        """The importance of each token and, with `clip`, its patch."""
        return 1 if self._space is None else 1 + self._space.tower_width

    @property
    def reads_questions(self) -> bool:
        """With `clip`."""
        return self.options.clip is not None

    @property
    def ranks(self) -> bool:
        """False: it reads no attention of the LLM."""
        return False

    def forecast(self) -> Forecast:
        """The budget, from the first layer on."""
        return Forecast(keeps={0: self._budget})

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Let every token carry its importance; nothing is dropped here."""
        import torch

        with torch.no_grad():
            scores = call.cls_attention(self._layer) if call.has_cls else call.received_attention(self._layer)
            carry = [own.float().to(rows.device)[:, None] for own, rows in zip(scores, call.features, strict=True)]
            if self._space is not None:
                carry = [torch.cat((own, rows.float()), 1) for own, rows in zip(carry, call.features, strict=True)]
        return Encode(carry=tuple(carry), scores=lambda: scores)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Keep the anchor and its expansion of every image."""
        import torch

        with torch.no_grad():
            scores = torch.full(call.index.shape, torch.nan, device=call.index.device)
            keep = (call.image_id < 0) | call.protected
            for sample, text in enumerate(self._texts(call)):
                if not len(text):
                    keep[sample] = True
                for number in torch.unique(call.image_id[sample][call.image_id[sample] >= 0]).tolist():
                    if len(text):
                        self._choose(call, sample, number, text, keep[sample], scores[sample])
        return Keep(keep, scores)

    def _texts(self, call: PruneCall) -> list[Float[Tensor, "texts dim"]]:
        """What each sample asks, in the space that relevance is told in; nothing where it has no instruction."""
        if self._space is not None:
            assert call.questions is not None
            asked = {question: self._space.text(question) for question in dict.fromkeys(call.questions)}
            found, real = [asked[question] for question in call.questions], call.instruction_valid.any(1)
            return [text[:0] if not asks else text for text, asks in zip(found, real.tolist(), strict=True)]
        rows, asks = operators.text_rows(call)
        index = call.index.gather(1, rows)
        return [embeds[i[real]] for embeds, i, real in zip(call.entry.embeds, index, asks, strict=True)]

    def _choose(
        self,
        call: PruneCall,
        sample: int,
        number: int,
        text: Float[Tensor, "texts dim"],
        keep: Bool[Tensor, "slots"],
        scores: Float[Tensor, "slots"],
    ) -> None:
        """Fill in what stays of one image, and the relevance of its tokens."""
        from torch.nn.functional import normalize

        from dropflow_anchorprune.choice import Anchoring, anchor, expanded

        assert call.carried is not None
        own = (call.image_id[sample] == number).nonzero()[:, 0]
        carried = call.carried[sample, own]
        if self._space is None:
            near = far = call.entry.embeds[sample, call.index[sample, own]]
        else:
            far = carried[:, 1:]
            near = self._space.patches(far).to(far)
        cosines = normalize(near.float(), dim=1, eps=1e-12) @ normalize(text.to(near).float(), dim=1, eps=1e-12).T
        scores[own] = cosines.amax(1) if self._space is None else -cosines.mean(1)
        held = call.protected[sample, own]
        total = self._budget.of(call.image_sizes[number])
        count = max(0, total - int(held.sum()))
        least = round(total * CORE) if self._core is None else self._core.of(call.image_sizes[number])
        how = Anchoring(self.options.threshold, self.options.patience, self.options.ratio)
        free = (~held).nonzero()[:, 0]
        anchors = anchor(scores[own][free], near[free], count, least, how)
        keep[own[free[expanded(anchors, carried[free, 0], far[free], count)]]] = True

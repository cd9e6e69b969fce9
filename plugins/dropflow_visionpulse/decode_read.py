"""What a decode step reads of the visual entries: those that the new token attends to in one layer (VisionPulse)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dropflow import CacheSelect, Depth, Stage, StageContext, StageOptions, StepCall, hookimpl
from dropflow.errors import PolicyError

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor


class DecodeReadOptions(StageOptions):
    """Options of `visionpulse/decode-read`."""

    at: Depth = Field(
        description="the anchor: the layer whose attention chooses (of a backbone in which it has none, the last one "
        "before it that has); published is 17 of 36. A sliding window ranks what it hides last, so take a layer without"
    )
    variant: Literal["official", "blocks", "port"] = Field(
        default="official",
        description="`official`: entries by their mean logits; `blocks`: whole blocks of entries; `port`: by mean "
        "probabilities, as in the other public port",
    )
    tau: float = Field(default=0.1, gt=0, description="temperature of the softmax from which the budget follows")
    budget_min: float = Field(default=0.01, ge=0, le=1, description="smallest share of the visual entries that is read")
    budget_max: float = Field(default=0.05, gt=0, le=1, description="largest share of the visual entries that is read")
    fixed: float | None = Field(
        default=None, gt=0, le=1, description="share of the visual entries that is read, whatever they are given"
    )
    block: int = Field(default=64, ge=1, description="entries in a block, for `variant: blocks`")
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="for `variant: port`: read as many as hold this share of the visual importance; published is 0.95",
    )
    from_layer: Literal["anchor", "next"] | None = Field(
        default=None,
        description="first layer that reads only the chosen: the anchor itself, as the official rule does, or the next "
        "one, as the others do",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.budget_min > self.budget_max:
            raise ValueError(f"`budget_min` {self.budget_min} is above `budget_max` {self.budget_max}")
        if self.top_p is not None and (self.variant != "port" or self.fixed is not None):
            raise ValueError("`top_p` goes with `variant: port` and without `fixed`")
        if self.variant == "port" and self.fixed is not None and not self.budget_min <= self.fixed <= self.budget_max:
            raise ValueError(
                f"`fixed` {self.fixed} lies outside `budget_min` {self.budget_min} to `budget_max` {self.budget_max}, "
                "between which `variant: port` holds it; widen them"
            )
        return self


class DecodeRead(Stage[DecodeReadOptions]):
    """While decoding, layers from the anchor on read only the visual entries that matter to the new token.

    The prefill is dense, and so is everything before the anchor. In every step, the anchor's attention from the new
    token says how much of it goes to vision in the head that gives most (the mass): as large a share of the visual
    entries is read, between two bounds, those with the largest mean logits. The others stay parked until a later step
    wants them. All images of a sample share one budget, as published; each sample of a batch has its own. Protected
    entries, text and generated tokens are always read. Where the policy prunes in the prefill, shares are of what the
    anchor's cache still holds.

    The mask of visual tokens lies in the cache, so conversations cannot mix theirs, as they do in the released code,
    where it lies on the model. Steps of several tokens are dense. `variant: port` leaves the prefill dense, which the
    port restricts for the prompt's last token.
    """

    Options = DecodeReadOptions
    summary = "each decode step reads the visual entries that the new token attends to, all others stay parked"
    paper = "VisionPulse, code xxhhbbbb/VisionPulse"
    example: ClassVar[Mapping[str, Any]] = {"at": 0.4, "tau": 0.4, "budget_min": 0.1, "budget_max": 0.4}

    def __init__(self, options: DecodeReadOptions, context: StageContext) -> None:
        super().__init__(options, context)
        shape, path = context.scale.target, context.path("at")
        asked = context.scale.boundary(options.at, path)
        anchor = shape.ranks_by(asked) if asked < shape.layers else None
        if anchor is None:
            expected = f"a layer from {shape.with_attention[0]} to {shape.layers - 1}"
            raise PolicyError(f"{path}: layer {asked} has no attention by which it could choose; expected {expected}")
        self._anchor = anchor
        later = options.from_layer or ("anchor" if options.variant == "official" else "next")
        self._first = anchor + (later == "next")
        if self._first > max(shape.with_attention):
            raise PolicyError(
                f"{path}: no layer after {anchor} has attention, so that nothing would be read less; expected a layer "
                f"before {max(shape.with_attention)}, or `from_layer: anchor`"
            )

    @property
    def decode_reads_at(self) -> tuple[int, ...]:
        """The anchor."""
        return (self._anchor,)

    @hookimpl
    def decode_cache(self, call: StepCall) -> CacheSelect:
        """Choose what the step reads from the anchor on."""
        import torch

        with torch.no_grad():
            return CacheSelect(self._active(call), self._first)

    def _active(self, call: StepCall) -> Bool[Tensor, "batch keys"]:
        from dropflow_visionpulse.rules import Budget, by_block, by_importance, by_mass

        options, logits = self.options, call.logits()
        budget = Budget(options.tau, options.budget_min, options.budget_max, options.fixed)
        if options.variant == "blocks":
            return by_block(logits, call.visual, call.view.valid, budget, options.block)
        if options.variant == "port":
            return by_importance(logits, call.visual, budget, options.top_p)
        return by_mass(logits, call.visual, budget)

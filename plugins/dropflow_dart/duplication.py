"""Pruning by duplication: pivots stay, and with them the tokens that are least similar to any pivot (DART)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from dropflow import Depth, Forecast, Keep, PruneCall, Stage, StageContext, StageOptions, Tokens, hookimpl, operators
from dropflow.errors import PolicyError
from dropflow_dart.released import ReleasedBudget

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class DuplicationOptions(StageOptions):
    """Options of `dart/duplication`."""

    at: Depth = Field(
        default=2,
        description="boundary at which it prunes; the keys of the layer before it choose the pivots",
    )
    keep: Tokens = Field(default=128, description="visual tokens per image that stay, pivots among them")
    image_pivots: PositiveInt = Field(default=4, description="pivots among the tokens of each image")
    text_pivots: NonNegativeInt = Field(
        default=4, description="pivots among the text after the image; fewer where there is less text"
    )
    reference: bool = Field(
        default=False,
        description="do as the released code does: count `keep`, rounded down to a multiple of all pivots, beside the "
        "image's pivots (132 for 128), of a share floor(share * tokens / pivots) for each pivot; go through the pivots "
        "in the order of a Python set of their indices, which changes a few of the kept tokens; and measure keys by "
        "their L1 norm, which RoPE makes depend on positions, so that padding before a prompt matters unless position "
        "ids leave it out, as those of `generate` do",
    )


class Duplication(Stage[DuplicationOptions]):
    """Of every image, the pivots stay, and the tokens that are least similar to one of them.

    Pivots are the tokens of the image, and of the text after it up to the instruction's last token, whose keys (in the
    layer before the boundary, after RoPE) have the largest norm. One pivot after the other, the image's by falling norm
    and then the text's, takes its share of the tokens whose hidden states, as the decoder's final norm gives them, have
    the smallest cosine to its own. Keys are measured by their L2 norm, which their position does not change. No
    attention map is formed. Each image has its own pivots, where the released code takes everything after the first
    image's start for one image and refuses batches; a pool that runs out, or a prompt with little text after the image,
    ends the choice where the released code fails. Protected tokens stay and count against the number. Raises
    `PolicyError` where vision takes no part in the layer before the boundary.
    """

    Options = DuplicationOptions
    summary = "pivot tokens stay, and the visual tokens that duplicate them least"
    paper = "arXiv:2502.11494, section 4"
    example: ClassVar[Mapping[str, Any]] = {"at": 0.35, "keep": 0.5, "image_pivots": 2, "text_pivots": 2}
    needs = frozenset({"final_norm"})

    def __init__(self, options: DuplicationOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._boundary = context.scale.boundary(options.at, context.path("at"))
        self._budget = context.scale.tokens(options.keep, context.path("keep"))
        if options.reference:
            self._budget = ReleasedBudget(
                asked=self._budget, image_pivots=options.image_pivots, text_pivots=options.text_pivots
            )
        window = context.window
        if not window.entry < self._boundary < window.exit:
            raise PolicyError(
                f"{context.path('at')}: at boundary {self._boundary} the keys of layer {self._boundary - 1} choose the "
                f"pivots, but vision takes part in layers {window.entry} to {window.exit - 1}; expected a boundary "
                f"from {window.entry + 1} to {window.exit - 1}"
            )

    @property
    def taps(self) -> tuple[int, ...]:
        """The layer before it."""
        return (self._boundary - 1,)

    def forecast(self) -> Forecast:
        """The budget, or with `reference` the number it becomes."""
        return Forecast(keeps={self._boundary: self._budget})

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Choose for every image."""
        import torch

        from dropflow_dart.pivots import key_sizes, turned_key_sizes

        assert call.final_norm is not None  # a policy is refused otherwise
        mask = torch.zeros_like(call.valid)
        with torch.no_grad():
            measure = key_sizes if self.options.reference else turned_key_sizes
            sizes = torch.stack([measure(own) for own in call.keys(self._boundary - 1)])
            states = call.final_norm(call.hidden)
            for image, entered in enumerate(call.image_sizes):
                rows, slots = ((call.image_id == image) & ~call.protected).nonzero(as_tuple=True)
                if len(slots):
                    row = int(rows[0])
                    held = int((call.image_id[row] == image).sum()) - len(slots)
                    kept, count = slots, max(0, self._budget.of(entered) - held)
                    if len(slots) > count:
                        kept = self._chosen(call, row, slots, sizes[row].to(slots.device), states[row], count)
                    mask[row, kept] = True
        return Keep(mask)

    def _chosen(
        self, call: PruneCall, row: int, slots: Tensor, sizes: Tensor, states: Tensor, count: int
    ) -> Int[Tensor, "kept"]:
        """Those of the slots of one image that stay."""
        import torch

        from dropflow_dart.pivots import even_quotas, least_alike, published_order, text_after

        own = slots[operators.top(sizes[slots], min(self.options.image_pivots, count))]
        text = text_after(call, row, int(slots[-1]))
        pivots = [*own.tolist(), *text[operators.top(sizes[text], self.options.text_pivots)].tolist()]
        if not pivots:
            return own
        if self.options.reference:  # by indices in the sample without its padding, whose order the released code has
            index = call.index[row]
            slot_of = {int(index[slot] - index[call.valid[row]].min()): slot for slot in pivots}
            pivots = [slot_of[place] for place in published_order(list(slot_of))]
        quotas = even_quotas(count - len(own), len(pivots))
        pool = slots[~torch.isin(slots, own)]
        return torch.cat((own, least_alike(states, pool.to(states.device), pivots, quotas).to(own.device)))

"""Which text tokens rate a picture, and how many of its tokens their attention tells apart."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow import PruneCall
from dropflow.operators import columns_of, text_rows


def relevance(visual: Float[Tensor, "visual dim"], text: Float[Tensor, "text dim"]) -> Float[Tensor, "text"]:
    """How much each text token has to do with the picture, summing to 1 (SparseVLM, text rater selection).

    Softmax over the text tokens of each visual token's dot products with them, mean over visual tokens, in float32.
    """
    return torch.softmax(visual.float() @ text.float().T, -1).mean(0)


def raters(relevance: Float[Tensor, "text"]) -> Bool[Tensor, "text"]:
    """Text tokens whose relevance is above the mean; all of them where none is, as with a single one.

    (The released code ranks by no row at all there, and keeps an arbitrary subset.)
    """
    above = relevance > relevance.mean()
    return above if bool(above.any()) else torch.ones_like(above)


def adaptive_count(attention: Float[Tensor, "raters visual"], scale: float, bias: float, *, most: int) -> int:
    """Tokens that stay by the rank of the raters' attention to a picture (SparseVLM, sparsification level adaptation).

    `int(scale * rank + bias)`, at least 0 and at most `most`; all of them where the rank is full. The rank is taken
    in float32, with singular values below max(shape) * eps * the largest counted as 0.
    """
    visual = attention.shape[1]
    rank = int(torch.linalg.matrix_rank(attention.float()))
    return visual if rank == visual else max(0, min(int(rank * scale + bias), most))


@torch.no_grad()
def rater_rows(call: PruneCall) -> tuple[Int[Tensor, "batch raters"], Bool[Tensor, "batch raters"]] | None:
    """Slots of the raters, and which entries count; `None` where no sample has text after its image.

    Raters are chosen among the text after a sample's first image, up to its last instruction token, by what entered
    the LLM, so that they are the same at every boundary.
    """
    rows, asks = text_rows(call)
    if not bool(asks.any()):
        return None
    rate = torch.zeros_like(asks)
    index = call.index.gather(1, rows)
    for sample, own in enumerate(asks):
        visual = call.entry.embeds[sample, call.entry.image_id[sample] >= 0]
        if bool(own.any()):
            rate[sample, own] = raters(relevance(visual, call.entry.embeds[sample, index[sample, own]]))
    order, real = columns_of(rate)
    return rows.gather(1, order), real

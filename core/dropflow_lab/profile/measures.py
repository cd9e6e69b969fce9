"""The layer-selection measures of HiDrop (arXiv:2602.23699, section 3), as pure functions of states and attention.

`B` samples, `T` tokens, `D` hidden size, `H` query heads. The paper gives the formulas and ships no code for them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity


def intra_modal_similarity(
    before: Float[Tensor, "B T D"], after: Float[Tensor, "B T D"], tokens: Bool[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """Return how little one layer changes the tokens of a modality: mean over `tokens` of cos(x_t^l, x_t^(l+1)).

    `before` and `after` are the hidden states at two consecutive boundaries. One value per sample, -1..1; NaN for a
    sample that has none of these tokens. (HiDrop: intra-modal similarity, for system, visual and instruction tokens.)
    """
    cosine = cosine_similarity(before.float(), after.float(), dim=-1)
    return (cosine * tokens).sum(1) / tokens.sum(1)


def cross_modal_similarity(
    mismatched: Float[Tensor, "tokens D"], reference: Float[Tensor, "tokens D"]
) -> Float[Tensor, ""]:
    """Return how little the instruction depends on the picture: mean over its tokens of cos(y_t, z_t).

    `y` are the states of the instruction tokens at one boundary after an unrelated picture, `z` those of the same
    tokens after a reference picture. 1 means that nothing of the picture has reached the text. (HiDrop: cross-modal
    similarity.)
    """
    return cosine_similarity(mismatched.float(), reference.float(), dim=-1).mean()


def ilvas(
    here: Float[Tensor, "B H T"], later: Float[Tensor, "B H T"], visual: Bool[Tensor, "B T"], top: float
) -> Float[Tensor, "B"]:
    """Return the inter-layer visual attention similarity, ILVAS(l, l+n, K).

    `here` and `later` hold the attention that each token receives from the query token in layers l and l+n, per head.
    With a_i^l the H numbers of visual token i, and V the K visual tokens with the highest mean over heads in layer l:
    (1/K) sum over i in V of cos(a_i^l, a_i^(l+n)). `top` is K as a share of a sample's visual tokens (0..1, rounded
    half up, at least 1). One value per sample, 0..1; NaN for a sample without visual tokens. (HiDrop: ILVAS.
    The paper does not state K or the query token; here it is the last token of the prompt, as in pruning.)
    """
    counts = visual.sum(1)
    wanted = (top * counts + 0.5).floor().clamp(min=1)
    order = here.float().mean(1).masked_fill(~visual, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    best = (rank < wanted[:, None]) & visual
    cosine = cosine_similarity(here.float(), later.float(), dim=1)
    return (cosine * best).sum(1) / best.sum(1)

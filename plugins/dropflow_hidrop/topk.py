"""The published top-k operator, for comparison with exact selection, and one whose scores do get gradient."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.operators import soft_counted, soft_top, standardised, straight_through

LEAST = 1e-8
"""Attention probability below which tokens count as equally unattended, in the logarithm."""
LEAST_WEIGHT = 0.01
"""Weight below which a token is dropped in the relaxed choice, to save its work."""


def soft_mask(scores: Float[Tensor, "candidates"], k: int, *, temperature: float = 1.0) -> Float[Tensor, "candidates"]:
    """Soft mask of the operator: sigmoid((rank / N - (1 - k / N)) * N * temperature).

    `rank_i = #{j: c_i >= c_j}`; entries above 0.5 are exactly those that `select: reference` keeps (HiDrop,
    arXiv:2602.23699, section 3.2, after Differentiable Model Scaling). Ranks are counts: scores get no gradient.
    """
    count = scores.shape[-1]
    rank = (scores[:, None] >= scores[None, :]).sum(1)
    return torch.sigmoid((rank - (count - k)).to(scores.dtype) * temperature)


def soft_weights(
    scores: Float[Tensor, "batch slots"],
    image: Int[Tensor, "batch slots"],
    keep: Bool[Tensor, "batch slots"],
    temperature: float,
) -> Float[Tensor, "batch slots"]:
    """Weights of `select: soft`: hard + soft - stop_gradient(soft), which is exactly 1 for every token that stays.

    soft_i = sigmoid((z_i - tau) / T), with tau such that an image's values sum to the k tokens kept of it (see
    `dropflow.operators.soft_top` for its gradient), and z the logarithm of the attention probabilities `scores`,
    standardised over the image's tokens. The logarithm takes the softmax's normaliser out: it is one summand for all
    tokens, which tau absorbs, so that an image is ranked by its q k / sqrt(d) however much attention text takes.
    Standardising makes one temperature fit layers whose scores spread differently. Probabilities under 1e-8 count as
    1e-8 and get no gradient. Computed in float32 at least.

    This operator is not published: HiDrop's section 3.2 describes a top-k that passes gradients, its code has none. The
    parts are the straight-through estimator (Bengio et al., 2013) and an entropy-regularised top-k (after Xie et al.,
    2020). `image` is -1 for tokens that are not chosen among.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    z = standardised(wide.clamp(min=LEAST).log(), image)
    return straight_through(soft_top(z, image, keep, temperature=temperature))


def relaxed_weights(
    scores: Float[Tensor, "batch slots"],
    image: Int[Tensor, "batch slots"],
    counts: Float[Tensor, "images"],
    temperature: float,
) -> Float[Tensor, "batch slots"]:
    """Weights of `learn`: the soft mask itself, which sums to the real count of each image.

    m_i = sigmoid((z_i - tau) / T) with z as in `soft_weights`, differentiable in the scores and in the counts. As
    T -> 0 it becomes the hard choice. Unlike the straight-through estimator's, its gradient is exactly that of the loss
    computed with it.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    z = standardised(wide.clamp(min=LEAST).log(), image)
    return soft_counted(z, image, counts, temperature=temperature)

"""Pure functions for trained selection: a top-k mask of each image that is differentiable in the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

HALVINGS = 64
"""Bisection steps of a threshold: as many as float64 can tell apart."""


def straight_through(soft: Float[Tensor, "batch slots"]) -> Float[Tensor, "batch slots"]:
    """Exactly 1 in value, with the gradient of `soft`: 1 + (soft - stop_gradient(soft)).

    The straight-through estimator (Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through
    Stochastic Neurons", 2013) for tokens that a hard mask keeps.
    """
    return 1 + (soft - soft.detach())


def soft_top(
    scores: Float[Tensor, "batch slots"],
    image: Int[Tensor, "batch slots"],
    keep: Bool[Tensor, "batch slots"],
    *,
    temperature: float,
) -> Float[Tensor, "batch slots"]:
    """Soft mask m_i = sigmoid((s_i - tau) / T) of each image, with tau such that it sums to k, the number kept.

    It solves max <s, m> + T * (binary entropy of m) over m in [0, 1]^n with sum(m) = k: top-k with an entropy
    regulariser, as by optimal transport in Xie et al., "Differentiable Top-k with Optimal Transport", 2020. tau is
    found by bisection and differentiated by the implicit function theorem: with a_i = m_i (1 - m_i),
    d tau / d s_j = a_j / sum(a), so d m_i / d s_j = a_i / T * ([i = j] - a_j / sum(a)). A token gains only what others
    of its image lose, and nearly all gradient is near the threshold. As T -> 0 the mask becomes `keep`, if that is a
    top-k.

    `image` holds image numbers, -1 for slots outside the selection; their scores may be anything, and their mask is 0.
    An image that keeps all its tokens gets ones, and one that keeps none gets zeros; neither gets a gradient. First
    derivatives only.
    """
    groups = _Groups.of(image)
    flat = torch.where(image < 0, 0, scores).flatten()
    size, k = groups.total(torch.ones_like(flat)), groups.total(keep.flatten().to(flat))
    undecided = ((k > 0) & (k < size))[groups.number]
    soft, _ = _relaxed(flat, groups, k, size, temperature)
    mask: Tensor = torch.where(undecided, soft, (keep & (image >= 0)).flatten().to(flat))
    return mask.view(scores.shape)


def soft_counted(
    scores: Float[Tensor, "batch slots"],
    image: Int[Tensor, "batch slots"],
    counts: Float[Tensor, "images"],
    *,
    temperature: float,
) -> Float[Tensor, "batch slots"]:
    """The soft mask of `soft_top` for real counts k, by image number; differentiable in the scores and in the counts.

    From sum(m) = k follows d m_i / d k = a_i / sum(a): one more token is shared out among those near the threshold. A
    count beyond the image's tokens gives ones, one of 0 or less zeros; neither has a gradient.
    """
    groups = _Groups.of(image)
    batch, images = image.shape[0], (groups.count - 1) // image.shape[0]
    flat = torch.where(image < 0, 0, scores).flatten()
    size = groups.total(torch.ones_like(flat))
    wanted = torch.nn.functional.pad(counts.to(flat)[:images].repeat(batch), (0, 1))
    k = wanted.detach()
    undecided = ((k > 0) & (k < size))[groups.number]
    soft, part = _relaxed(flat, groups, k, size, temperature)
    follows = part * (wanted - k)[groups.number]  # 0, with the gradient of the counts
    whole = ((k > 0)[groups.number] & (image >= 0).flatten()).to(flat)
    return torch.where(undecided, soft + follows, whole).view(scores.shape)


def standardised(
    scores: Float[Tensor, "batch slots"], image: Int[Tensor, "batch slots"], *, floor: float = 1e-2
) -> Float[Tensor, "batch slots"]:
    """Scores minus the mean of their image, divided by its standard deviation; differentiable.

    `floor` is added to the deviation in quadrature, so that images of equal scores have no steep gradient. Slots of no
    image (-1) may have any score and get 0.
    """
    groups = _Groups.of(image)
    flat = torch.where(image < 0, 0, scores).flatten()
    size = groups.total(torch.ones_like(flat)).clamp(min=1)
    centred = flat - (groups.total(flat) / size)[groups.number]
    deviation = (groups.total(centred.square()) / size + floor**2).sqrt()
    return (centred / deviation[groups.number]).view(scores.shape)


def _relaxed(flat: Tensor, groups: _Groups, k: Tensor, size: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The soft mask of each group, differentiable in the scores, and a / sum(a) of every slot without a gradient."""
    with torch.no_grad():
        tau = _threshold(flat, groups, k, size, temperature)[groups.number]
        x = (flat - tau) / temperature
        part = groups.softmax(logsigmoid(x) + logsigmoid(-x))  # a / sum(a), which cannot underflow to 0 / 0
    follows = groups.total(part * (flat - flat.detach()))[groups.number]  # 0, with the gradient of tau
    return torch.sigmoid((flat - tau - follows) / temperature), part


def _threshold(flat: Tensor, groups: _Groups, k: Tensor, size: Tensor, temperature: float) -> Tensor:
    """The threshold of each group, by bisection; any finite number where there is nothing to decide."""
    offset = temperature * torch.logit((k / size.clamp(min=1)).clamp(1e-6, 1 - 1e-6))
    # with tau = lowest - offset no value is below k / size, with tau = highest - offset none is above
    low, high = groups.extreme(flat, "amin") - offset, groups.extreme(flat, "amax") - offset
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = groups.total(torch.sigmoid((flat - middle[groups.number]) / temperature)) > k
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class _Groups:
    """Sums over the tokens of each image, separately in each sample; the last group holds the slots of no image."""

    number: Int[Tensor, "slots"]
    count: int

    @classmethod
    def of(cls, image: Int[Tensor, "batch slots"]) -> _Groups:
        batch, images = image.shape[0], int(image.max()) + 1
        number = image + images * torch.arange(batch, device=image.device)[:, None]
        return cls(torch.where(image < 0, batch * images, number).flatten(), batch * images + 1)

    def total(self, values: Float[Tensor, "slots"]) -> Float[Tensor, "groups"]:
        return values.new_zeros(self.count).scatter_add(0, self.number, values)

    def extreme(self, values: Float[Tensor, "slots"], which: str) -> Float[Tensor, "groups"]:
        return values.new_zeros(self.count).scatter_reduce(0, self.number, values, which, include_self=False)

    def softmax(self, values: Float[Tensor, "slots"]) -> Float[Tensor, "slots"]:
        power = (values - self.extreme(values, "amax")[self.number]).exp()
        return power / self.total(power)[self.number]

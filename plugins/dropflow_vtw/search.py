"""The search for the boundary of withdrawal: the first one that hardly changes the next token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dropflow

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

FIRST = 5
"""The lowest boundary that the released search tries."""


@dataclass(frozen=True)
class Search:
    """The result of a search for the boundary."""

    divergences: Mapping[int, float]
    """Boundary -> mean KL divergence over the samples, in nats."""
    boundary: int | None
    """The first boundary whose divergence is within the threshold; `None` where none is."""


def find_boundary(
    model: Any, samples: Iterable[Mapping[str, Any]], *, threshold: float = 0.003, candidates: Iterable[int] = ()
) -> Search:
    """Search the boundary at which `model` can do without vision, on prompts with images.

    `samples` are inputs of the model's forward, one prompt each, such as a processor returns; the released search uses
    20. `candidates` are boundaries, by default those from 5 to the last layer. The threshold eta is 0.003 for
    LLaVA-1.5-7B, 0.0005 for 13B, 0.0001 for LLaVA-NeXT-7B in the released code, which fails where this answers `None`.
    Costs one prefill per sample and candidate, and one more per sample. Raises `ValueError` without samples or
    candidates, or for a sample that is not one prompt.
    """
    import torch

    depth = dropflow.backbone_for(model).shape.layers
    boundaries = sorted(set(candidates)) or list(range(FIRST, depth))
    if not boundaries or not 0 <= boundaries[0] <= boundaries[-1] <= depth:
        raise ValueError(f"find_boundary: expected candidates from 0 to {depth}, got {boundaries}; name some")
    sums, count = torch.zeros(len(boundaries), dtype=torch.float64), 0
    for inputs in samples:
        dense = last_logits(model, inputs)
        found = [divergence(dense, last_logits(model, inputs, at)) for at in boundaries]
        sums += torch.stack(found).double().cpu()
        count += 1
    if not count:
        raise ValueError("find_boundary: expected at least one prompt with an image, got none")
    means = (sums / count).tolist()
    return Search(dict(zip(boundaries, means, strict=True)), first_within(boundaries, means, threshold))


def last_logits(
    model: Any,
    inputs: Mapping[str, Any],
    at: int | None = None,
    visual: Bool[Tensor, "1 tokens"] | None = None,
) -> Float[Tensor, "vocabulary"]:
    """Logits after the last token of one prompt, with vision withdrawn at boundary `at` (`None`: the dense model).

    `visual` says which tokens are visual where image features are merged into `inputs_embeds` already. Raises
    `ValueError` for a batch or a prompt that ends in padding.
    """
    tokens = inputs.get("inputs_embeds", inputs.get("input_ids"))
    mask = inputs.get("attention_mask")
    if tokens is None or len(tokens) != 1 or (mask is not None and not bool(mask[0, -1])):
        shape = None if tokens is None else tuple(tokens.shape)
        raise ValueError(f"last_logits: expected one prompt without padding after it, got tokens of shape {shape}")
    if at is None:
        return _last(model, inputs)
    policy = {"name": "withdrawal", "stages": {"withdraw": {"use": "vtw/withdrawal", "at": at}}}
    with dropflow.attach(model, policy) as flow:
        if visual is None:
            return _last(model, inputs)
        with flow.visual(visual):
            return _last(model, inputs)


def _last(model: Any, inputs: Mapping[str, Any]) -> Float[Tensor, "vocabulary"]:
    import torch

    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits[0, -1]
    return logits


def divergence(dense: Float[Tensor, "vocabulary"], withdrawn: Float[Tensor, "vocabulary"]) -> Float[Tensor, ""]:
    """KL(p_withdrawn || p_dense) of the next token, in nats, from logits; the released code has this order."""
    log_p, log_dense = (logits.float().log_softmax(-1) for logits in (withdrawn, dense))
    return (log_p.exp() * (log_p - log_dense)).sum()


def first_within(boundaries: Sequence[int], divergences: Sequence[float], threshold: float) -> int | None:
    """The first boundary whose divergence is at most the threshold; `None` where none is."""
    return next((b for b, value in zip(boundaries, divergences, strict=True) if value <= threshold), None)

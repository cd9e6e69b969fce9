"""Quality of answers when vision exits early or enters late, compared with no policy and with the right answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import dropflow
from dropflow_lab.inputs.data import Sample


@dataclass(frozen=True)
class Quality:
    """How well a model answers."""

    accuracy: float | None
    """Share of right answers; `None` if the data has none."""
    agreement: float
    """Share of answers that are, token by token, those of the model without a policy."""
    kl: float
    """KL divergence from the model without a policy, in nats: mean over the answer's tokens (see `answer_kl`)."""

    @property
    def score(self) -> float:
        """What the rule uses: accuracy if it is known, otherwise agreement."""
        return self.agreement if self.accuracy is None else self.accuracy


@dataclass(frozen=True)
class Answers:
    """Greedy answers of a batch."""

    tokens: Int[Tensor, "batch steps"]
    """Generated ids, including what follows an end token."""
    logits: Float[Tensor, "batch steps vocabulary"]
    texts: list[str]


@dataclass
class Tally:
    """Accumulates one policy's answers, batch after batch."""

    right: list[bool] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def add(self, batch: Sequence[Sample], dense: Answers, given: Answers, ends: Sequence[int]) -> None:
        """Compare one batch's answers with the dense ones and, where known, the right ones."""
        self.right += [
            sample.is_answered_by(text)
            for sample, text in zip(batch, given.texts, strict=True)
            if sample.answer is not None
        ]
        steps = min(dense.tokens.shape[1], given.tokens.shape[1])
        counted = shared_positions(dense.tokens[:, :steps], given.tokens[:, :steps], ends)
        self.same += same_answers(dense.tokens, given.tokens, ends).tolist()
        self.kl += answer_kl(dense.logits[:, :steps], given.logits[:, :steps], counted).tolist()

    def quality(self) -> Quality:
        """Return the shares and means so far."""
        accuracy = sum(self.right) / len(self.right) if self.right else None
        return Quality(accuracy, sum(self.same) / len(self.same), sum(self.kl) / len(self.kl))


def generate(model: Any, processor: Any, inputs: Any, policy: dropflow.Policy | None, max_new_tokens: int) -> Answers:
    """Answer greedily, under `policy` if there is one."""
    with torch.no_grad(), nullcontext() if policy is None else dropflow.attach(model, policy):
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return Answers(tokens, torch.stack(out.logits, 1).float(), texts)


def end_tokens(model: Any) -> tuple[int, ...]:
    """Return the ids that end an answer."""
    ends = model.generation_config.eos_token_id
    return tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)


def shared_positions(
    dense: Int[Tensor, "batch steps"], given: Int[Tensor, "batch steps"], ends: Sequence[int]
) -> Bool[Tensor, "batch steps"]:
    """Return the positions at which both models have read the same: up to the first that differs, or the end token."""
    before = (dense == given) & ~torch.isin(dense, torch.tensor(ends, dtype=dense.dtype, device=dense.device))
    reached = torch.nn.functional.pad(before, (1, 0), value=True)[:, :-1]
    return reached.cumprod(1).bool()


def same_answers(
    dense: Int[Tensor, "batch steps"], given: Int[Tensor, "batch more"], ends: Sequence[int]
) -> Bool[Tensor, "batch"]:
    """Return whether two answers agree up to and including the end token; a truncated answer ends where it is cut."""
    steps = min(dense.shape[1], given.shape[1])
    one, two = dense[:, :steps], given[:, :steps]
    return ((one == two) | ~shared_positions(one, two, ends)).all(1)


def answer_kl(
    dense: Float[Tensor, "batch steps vocabulary"],
    given: Float[Tensor, "batch steps vocabulary"],
    counted: Bool[Tensor, "batch steps"],
) -> Float[Tensor, "batch"]:
    """Return KL(dense || given) = sum over v of p(v) (log p(v) - log q(v)), in nats, per sample.

    Mean over the counted positions: those at which both models have read the same tokens.
    """
    log_p, log_q = dense.log_softmax(-1), given.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (divergence * counted).sum(1) / counted.sum(1)

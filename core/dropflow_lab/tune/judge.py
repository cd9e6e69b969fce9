"""How close a model stays to itself under a policy: its answers to the same questions, question by question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from pydantic import TypeAdapter

import dropflow
from dropflow import Policy
from dropflow_lab.inputs.data import Sample
from dropflow_lab.inputs.frames import stating_videos
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.profile.sweep import Answers, Tally, end_tokens, generate
from dropflow_lab.store.digests import digest_of_code, digest_of_questions, digest_of_weights
from dropflow_lab.store.finished import Finished

_INSTRUMENTS = ("dropflow_lab.tune.judge", "dropflow_lab.profile.sweep")
_SIGMAS = 2.0
"""Standard errors by which a policy has to be further from the model than its rival to be given up."""


@dataclass(frozen=True)
class Verdict:
    """What was found about one policy, one value per question asked."""

    kl: tuple[float, ...]
    """KL divergence from the model without a policy, in nats (`profile.sweep.answer_kl`)."""
    same: tuple[bool, ...]
    """Whether the answer is, token by token, that of the model without a policy."""
    right: tuple[bool, ...]
    """Whether the answer is right; false where none is known."""
    average_tokens: float
    """Visual tokens per layer, averaged over layers, forwards of the answer, and questions."""
    flops: float
    """Multiply-adds of the decoder's prefill, text included, as a share of those without a policy."""
    kv: float
    """Bytes of the KV cache after the prefill, text included, as a share of those without a policy."""
    stopped: bool
    """Whether it was given up before all questions were asked."""

    @property
    def distance(self) -> float:
        """Mean KL divergence over the questions asked."""
        return fmean(self.kl)


class Judge:
    """Asks one model the same questions under many policies; finished verdicts are read, not repeated.

    Raises `claims.Taken` where another process is asking under the same policy.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        finished: Finished,
        batch: int = 32,
        max_new_tokens: int = 16,
    ) -> None:
        self.model, self.samples, self.finished = model, samples, finished
        self._processor, self._batch, self._max_new_tokens = processor, batch, max_new_tokens
        self._ends = end_tokens(model)
        self._dense: dict[int, tuple[Any, Answers]] = {}
        self.facts: dict[str, Any] = {
            "weights": digest_of_weights(model),
            "questions": digest_of_questions(samples),
            "batch": batch,
            "max_new_tokens": max_new_tokens,
        }

    def verdict(self, policy: Policy, rival: Sequence[float] = ()) -> Verdict:
        """Judge a policy; it is given up as soon as it is clearly further from the model than `rival`.

        `rival` is the KL divergence of another policy on each of the questions.
        """
        code = digest_of_code([policy], _INSTRUMENTS)
        facts = self.facts | {"policy": policy.to_dict(), "rival": list(rival), "code": code}
        parse = TypeAdapter(Verdict).validate_python
        return self.finished.once(f"verdict-{policy.name}", facts, lambda: self._ask(policy, rival), parse, asdict)

    def dense(self) -> list[bool]:
        """Whether each question is answered correctly without a policy."""

        def measure() -> list[bool]:
            texts = [text for start in self._starts() for text in self._without(start)[1].texts]
            return [sample.is_answered_by(text) for sample, text in zip(self.samples, texts, strict=True)]

        facts = self.facts | {"code": digest_of_code([], _INSTRUMENTS)}
        return self.finished.once("dense", facts, measure, TypeAdapter(list[bool]).validate_python, list)

    def _starts(self) -> range:
        return range(0, len(self.samples), self._batch)

    def _ask(self, policy: Policy, rival: Sequence[float]) -> Verdict:
        tally, right = Tally(), list[bool]()
        tokens = flops = kv = 0.0
        for start in self._starts():
            if hopeless(tally.kl, rival):
                break
            batch = self.samples[start : start + self._batch]
            inputs, dense = self._without(start)
            asked = [sample.question for sample in batch]
            with (
                dropflow.questions(asked),
                stating_videos(inputs, batch),
                dropflow.attach(self.model, policy) as flow,
            ):
                given = generate(self.model, self._processor, inputs, None, self._max_new_tokens)
                report = flow.report()
            tally.add(batch, dense, given, self._ends)
            right += [sample.is_answered_by(text) for sample, text in zip(batch, given.texts, strict=True)]
            tokens += len(batch) * report.average_visual_tokens_answer
            flops += len(batch) * report.flops / report.flops_dense
            kv += len(batch) * report.kv_bytes / report.kv_bytes_dense
        judged = len(right)
        costs = (tokens / judged, flops / judged, kv / judged)
        return Verdict(tuple(tally.kl), tuple(tally.same), tuple(right), *costs, stopped=judged < len(self.samples))

    def _without(self, start: int) -> tuple[Any, Answers]:
        """Inputs of one batch, and the answers without a policy."""
        if start not in self._dense:
            batch = self.samples[start : start + self._batch]
            inputs = build_inputs(self._processor, [(sample.images(), sample.question) for sample in batch])
            inputs = inputs.to(self.model.device, self.model.dtype)
            self._dense[start] = inputs, generate(self.model, self._processor, inputs, None, self._max_new_tokens)
        return self._dense[start]


def hopeless(own: Sequence[float], rival: Sequence[float]) -> bool:
    """Whether the mean of `own` is above that of the same questions of `rival` by two standard errors, paired."""
    asked = min(len(own), len(rival))
    if asked < 2:
        return False
    more = [one - other for one, other in zip(own, rival, strict=False)]
    return fmean(more) > _SIGMAS * stdev(more) / math.sqrt(asked)

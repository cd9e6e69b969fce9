"""A model's answers under a policy, and the number of visual tokens they took."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from rich.progress import track

import dropflow
from dropflow import Policy
from dropflow.backbone.backbone import backbone_for
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow_lab.inputs.data import Sample
from dropflow_lab.inputs.frames import stating_videos
from dropflow_lab.inputs.prompts import build_inputs, generate
from dropflow_lab.measure.prefill import Prefill

Shown = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]
"""Names of a question's pictures, and which of them are frames of which video."""


@dataclass(frozen=True)
class Answers:
    """The answers of one run over all questions."""

    said: tuple[str, ...]
    """Greedy answers, in the order of the questions."""
    average_visual_tokens: float
    """Visual tokens per decoder layer, averaged over all layers and all questions, as measured in each prefill."""
    average_visual_tokens_answer: float
    """The same, averaged over all forwards of each answer: fewer where stages evict while decoding."""
    entry_visual_tokens: float
    """Visual tokens handed to the LLM, averaged over all questions."""


def ask(
    model: Any, processor: Any, policy: Policy | None, samples: Sequence[Sample], *, batch: int, max_new_tokens: int
) -> Answers:
    """Answer all questions greedily under a policy (`None`: without one), in batches padded on the left.

    Questions about the same pictures are asked together, and under a policy begin with a prefix, which changes neither
    answers nor tokens; once a prefix is refused, each of them is asked anew.
    """
    name = "dense" if policy is None else policy.name
    backbone, took, said = backbone_for(model), Prefill(), [""] * len(samples)
    with nullcontext() if policy is None else dropflow.attach(model, policy) as flow:
        asking = _Asking(model, processor, flow, max_new_tokens)
        for places in track(_batches(samples, batch), f"{name}: answers"):
            inputs, found = asking.answers([samples[place] for place in places])
            for place, answer in zip(places, found, strict=True):
                said[place] = answer
            took += Prefill.of(backbone, flow, inputs)
    means = took.means()
    return Answers(
        tuple(said),
        means["average_visual_tokens"],
        means["average_visual_tokens_answer"],
        means["entry_visual_tokens"],
    )


def _batches(samples: Sequence[Sample], most: int) -> list[list[int]]:
    """Places of the questions of each batch: those about the same pictures together, then those about others."""
    same: dict[Shown, list[int]] = {}
    for place, sample in enumerate(samples):
        same.setdefault(_shown(sample), []).append(place)
    groups = [places for places in same.values() if len(places) > 1]
    groups.append([place for places in same.values() if len(places) == 1 for place in places])
    return [places[start : start + most] for places in groups for start in range(0, len(places), most)]


def _shown(sample: Sample) -> Shown:
    return tuple(picture.name for picture in sample.pictures), sample.videos


class _Asking:
    """Answers batches under one attached policy, or under none."""

    def __init__(self, model: Any, processor: Any, flow: dropflow.Flow | None, max_new_tokens: int) -> None:
        self._model, self._processor, self._new = model, processor, max_new_tokens
        self._flow = None if flow is None or flow.plan.idle else flow
        self._begins = self._flow is not None  # until a prefix is refused
        # of the pictures that were asked about last
        self._prefix: tuple[Shown, dropflow.Prefix] | None = None

    def answers(self, asked: Sequence[Sample]) -> tuple[Any, list[str]]:
        """The model's inputs for one batch, with the whole prompts, and the answers."""
        inputs = build_inputs(self._processor, [(one.images(), one.question) for one in asked])
        with dropflow.questions([one.question for one in asked]):
            return inputs, self._said(asked, inputs)

    def _said(self, asked: Sequence[Sample], inputs: Any) -> list[str]:
        prefix = self._shared(asked)
        if prefix is not None:
            try:
                return generate(self._model, self._processor, inputs, self._new, prefix)
            except UnsupportedCall:  # such as prompts in which the question comes before the pictures
                self._begins, self._prefix = False, None
        with stating_videos(inputs, asked):
            return generate(self._model, self._processor, inputs, self._new)

    def _shared(self, asked: Sequence[Sample]) -> dropflow.Prefix | None:
        """The prefix of the pictures that all questions of a batch are about, if there are such and it can be made."""
        pictures = _shown(asked[0])
        if self._prefix is not None and self._prefix[0] == pictures:
            return self._prefix[1]
        self._prefix = None
        if not self._begins or len(asked) == 1 or any(_shown(one) != pictures for one in asked):
            return None
        assert self._flow is not None
        first = asked[0]
        inputs = build_inputs(self._processor, [(first.images(), first.question)])
        try:
            with dropflow.questions([first.question]), stating_videos(inputs, [first]):
                made = self._flow.prefix(**inputs.to(self._model.device, self._model.dtype))
        except (UnsupportedCall, UnsupportedModel):
            self._begins = False
            return None
        self._prefix = pictures, made
        return made

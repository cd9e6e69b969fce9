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
from dropflow_lab.inputs.data import Sample
from dropflow_lab.inputs.frames import stating_videos
from dropflow_lab.inputs.prompts import build_inputs, generate
from dropflow_lab.measure.prefill import Prefill


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
    """Answer all questions greedily under a policy (`None`: without one), in batches padded on the left."""
    name = "dense" if policy is None else policy.name
    backbone = backbone_for(model)
    said: list[str] = []
    took = Prefill()
    with nullcontext() if policy is None else dropflow.attach(model, policy) as flow:
        for start in track(range(0, len(samples), batch), f"{name}: answers"):
            asked = samples[start : start + batch]
            inputs = build_inputs(processor, [(one.images(), one.question) for one in asked])
            with dropflow.questions([one.question for one in asked]), stating_videos(inputs, asked):
                said += generate(model, processor, inputs, max_new_tokens)
            took += Prefill.of(backbone, flow, inputs)
    means = took.means()
    return Answers(
        tuple(said),
        means["average_visual_tokens"],
        means["average_visual_tokens_answer"],
        means["entry_visual_tokens"],
    )

"""Accuracy of a model on the questions about clips, through the standard path: processor, generate, decode."""

from __future__ import annotations

from typing import Any

from dropflow_lab.compare.answers import ask
from dropflow_lab.compare.digits_accuracy import Accuracy, Score
from dropflow_lab.digits.data.clip_questions import CLIP_KINDS
from dropflow_lab.inputs.data import CLIPS, read_samples

TEST_QUESTIONS, TEST_SEED = 900, 2026
"""Number and seed of the questions, all of the test split, that test a checkpoint."""
_LONGEST_ANSWER = 4


def evaluate_clips(model: Any, processor: Any) -> str:
    """Ask the test questions without a policy; return shares, intervals and counts as a JSON object."""
    samples = read_samples(CLIPS, TEST_QUESTIONS, TEST_SEED)
    said = ask(model, processor, None, samples, batch=30, max_new_tokens=_LONGEST_ANSWER).said
    right = dict.fromkeys(CLIP_KINDS, 0)
    asked = dict.fromkeys(CLIP_KINDS, 0)
    for sample, answer in zip(samples, said, strict=True):
        kind = str(sample.kind)
        asked[kind] += 1
        right[kind] += sample.is_answered_by(answer)
    kinds = {kind: Score(right[kind], asked[kind]) for kind in CLIP_KINDS}
    return Accuracy(Score(sum(right.values()), len(samples)), kinds, said).to_json()

"""One question asked twice: without and with a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

import dropflow
from dropflow import Policy
from dropflow.backbone import backbone_for
from dropflow_lab.prompts import build_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

UNIT = "multiply-adds of the decoder's prefill, text included"


@dataclass(frozen=True)
class Comparison:
    """Both answers, and what the policy left to do."""

    question: str
    visual_tokens: int
    """Visual tokens of the prompt, before anything is dropped."""
    answer_dense: str
    """Without a policy."""
    answer: str
    report: dropflow.Report
    """Of the run with the policy."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with the unit of all FLOPs."""
        said = asdict(self)
        report: dict[str, Any] = said.pop("report")
        return said | report | {"unit": UNIT}


def compare(
    model: Any, processor: Any, images: Sequence[Image], question: str, policy: Policy, max_new_tokens: int
) -> Comparison:
    """Ask one question about all `images` without and with `policy`, decoding greedily."""
    inputs = build_inputs(processor, [(images, question)]).to(model.device, model.dtype)
    with dropflow.attach(model, policy) as flow:
        answer = _generate(model, processor, inputs, max_new_tokens)
        report = flow.report()
    visual_tokens = int(backbone_for(model).placeholders(inputs["input_ids"]).sum())
    return Comparison(question, visual_tokens, _generate(model, processor, inputs, max_new_tokens), answer, report)


def _generate(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = out[:, inputs["input_ids"].shape[1] :]
    answers: list[str] = processor.batch_decode(new, skip_special_tokens=True)
    return answers[0].strip()

"""One question answered twice, without and with a policy, by one model or by two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import dropflow
from dropflow import Policy
from dropflow.backbone.backbone import backbone_for
from dropflow_lab.inputs.prompts import build_inputs, generate

if TYPE_CHECKING:
    from PIL.Image import Image

UNIT = "multiply-adds of the decoder's prefill, text included"


@dataclass(frozen=True)
class Comparison:
    """Both answers, and the report of the run with the policy."""

    question: str
    visual_tokens: int
    """Visual tokens of the prompt, before anything is dropped."""
    answer_dense: str
    """Answer without a policy."""
    answer: str
    report: dropflow.Report
    """Report of the run with the policy."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with the unit of all FLOPs."""
        said = asdict(self)
        report: dict[str, Any] = said.pop("report")
        return said | report | {"unit": UNIT}


def compare(
    model: Any,
    processor: Any,
    images: Sequence[Image],
    question: str,
    policy: Policy,
    max_new_tokens: int,
    *,
    plain: Any | None = None,
) -> Comparison:
    """Ask one question about all `images` without and with `policy`, decoding greedily.

    `plain` answers without the policy instead of `model`: the model that `model` was finetuned from, of the same shape.
    """
    inputs = build_inputs(processor, [(images, question)]).to(model.device, model.dtype)
    with dropflow.questions([question]), dropflow.attach(model, policy) as flow:
        (answer,) = generate(model, processor, inputs, max_new_tokens)
        report = flow.report()
    visual_tokens = int(backbone_for(model).placeholders(inputs["input_ids"]).sum())
    (answer_dense,) = generate(plain or model, processor, inputs, max_new_tokens)
    return Comparison(question, visual_tokens, answer_dense, answer, report)

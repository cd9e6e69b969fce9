"""One question with and without a policy."""

from __future__ import annotations

from dropflow import load_policy
from dropflow_lab.digits.checkpoints.model import sample_image
from dropflow_lab.explain.side_by_side import compare
from dropflow_lab.inputs.models import load_model

KEEP_ALL = {"name": "keep-all", "stages": {"p": {"use": "hidrop/concave-pyramid", "keep": {1: 1.0}}}}


def test_a_policy_that_keeps_everything_changes_no_answer(model_folder) -> None:
    model, processor = load_model(model_folder)
    comparison = compare(model, processor, [sample_image()], "is there a 7 ?", load_policy(KEEP_ALL), 4)
    assert comparison.answer == comparison.answer_dense
    assert comparison.visual_tokens == 144
    assert comparison.report.flops == comparison.report.flops_dense


def test_the_model_is_detached_afterwards(model_folder) -> None:
    model, processor = load_model(model_folder)
    for _ in range(2):  # a policy that stayed attached would refuse the second
        compare(model, processor, [sample_image()], "is there a 7 ?", load_policy(KEEP_ALL), 1)
    assert not hasattr(model.config, "dropflow")

"""What a package of one's own tests: its maths by hand, the rest with the conformance kit."""

import pytest
import torch
from tiny_deepseek_vl import tiny

import dropflow
from dropflow import BackboneShape
from dropflow.testing import assert_backbone_conforms, assert_stage_conforms, tiny_models
from dropflow_example.deepseek_vl import DeepseekVL
from dropflow_example.top_p import top_p

DEEPSEEK = {"deepseek_vl": (DeepseekVL, tiny())}


@pytest.mark.parametrize(
    ("mass", "kept"),
    [
        (0.30, [False, True, False, False]),
        (0.50, [False, True, False, False]),
        (0.55, [True, True, False, False]),
        (0.90, [True, True, False, True]),
        (0.99, [True, True, True, True]),
    ],
)
def test_the_fewest_best_tokens_reach_the_mass(mass: float, kept: list[bool]) -> None:
    scores = torch.tensor([[4.0, 8.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert top_p(scores, mass).tolist() == [kept, [False] * 4]


def test_the_stage_conforms_on_families_of_every_kind() -> None:
    names = ("gemma3", "qwen3_vl")
    cells = assert_stage_conforms("example/top-p", models=DEEPSEEK | {name: tiny_models()[name] for name in names})
    assert [cell.adapter for cell in cells] == ["deepseek_vl", *names]
    assert {cell.outcome for cell in cells} == {"run"}, [cell.detail for cell in cells]


def test_the_adapter_conforms() -> None:
    assert 0 < assert_backbone_conforms("deepseek_vl", tiny()) < 1e-5


@torch.no_grad()
def test_the_policy_prunes_at_half_and_at_three_quarters_of_the_depth() -> None:
    model, inputs = tiny().model(), tiny().prompt([(3, "I", 5)])[0]
    smaller = dropflow.load_policy("example-top-p", ["stages.early.mass=0.6", "stages.late.mass=0.3"])
    with dropflow.attach(model, smaller) as flow:
        model(**inputs)
        visual = [layer.visual_tokens for layer in flow.report().layers]
    assert DeepseekVL(model).shape == BackboneShape(6, 16)
    assert visual[:3] == [16, 16, 16]
    assert 16 > visual[3] == visual[4] > visual[5] > 1  # 0.75 of 6 layers is 4.5, which rounds up

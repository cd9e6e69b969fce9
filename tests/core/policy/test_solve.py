"""Numbers written as `solve` follow from the budget: against published schedules, and against trying every count."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from tiny import prompt, tiny_llava
from transformers import AutoModelForImageTextToText

import dropflow
from dropflow import BackboneShape
from dropflow.backbone.flops import LLAVA_7B, vision_only
from dropflow.errors import PolicyError
from dropflow.policy.plan import Plan, resolve
from dropflow.policy.policy import schema
from dropflow.policy.solve import solved_numbers

LLAVA = BackboneShape(32, 576)
WORK = partial(vision_only, shape=LLAVA_7B)
INJECT = {"use": "hidrop/late-injection", "at": 8}
EXIT = {"use": "hidrop/early-exit", "at": 24}
FOUR = {10: "solve", 14: "solve", 16: "solve", 18: "solve"}


def pyramid(keep: Any) -> dict[str, Any]:
    return {"use": "hidrop/concave-pyramid", "keep": keep}


def solved(
    budget: dict[str, float], stages: dict[str, Any], shape: BackboneShape = LLAVA, **head: Any
) -> tuple[dict[str, Any], Plan]:
    policy = dropflow.load_policy({"name": "solved", "budget": budget, "stages": stages, **head})
    plan = resolve(policy, shape, work=WORK)
    return solved_numbers(policy, plan.policy), plan


def kv(plan: Plan) -> float:
    counts = plan.schedule(plan.shape.visual_tokens or 576).per_layer
    return sum(counts[layer] or 0 for layer in plan.shape.holding) / (576 * len(plan.shape.holding))


@pytest.mark.parametrize(("average", "first"), [(48, 87), (64, 215), (80, 343)])
def test_the_published_first_keeps(average: int, first: int) -> None:
    """HiDrop, tables 1 and 7: the other keeps are fixed."""
    stages = {"inject": INJECT, "pyramid": pyramid({10: "solve", 14: 10, 16: 5, 18: 1}), "exit": EXIT}
    numbers, plan = solved({"average_tokens": average}, stages)
    assert numbers == {"stages.pyramid.keep.10": first}
    assert average - 4 / 32 < (plan.schedule().average or 0) <= average
    assert plan.policy.budget is None


def test_several_keeps_shrink_by_one_factor_and_spend_the_whole_budget() -> None:
    numbers, plan = solved({"average_tokens": 64}, {"inject": INJECT, "pyramid": pyramid(FOUR), "exit": EXIT})
    assert list(numbers.values()) == [180, 56, 17, 5]  # docs/profile.md: the profiler's rule gives these, too
    assert plan.schedule().average == 64


@pytest.mark.parametrize("limit", [0.1, 0.25, 0.5])
def test_one_count_is_the_largest_that_fits_flops_and_kv(limit: float) -> None:
    def cost(kind: str, keep: int) -> float:
        plan = resolve(dropflow.load_policy({"name": "x", "stages": {"p": pyramid({3: keep})}}), LLAVA)
        if kind == "kv":
            return kv(plan)
        return sum(WORK(count or 0) for count in plan.schedule().per_layer) / (32 * WORK(576))

    for kind in ("flops", "kv"):
        numbers, _ = solved({kind: limit}, {"p": pyramid({3: "solve"})})
        (keep,) = numbers.values()
        assert cost(kind, keep) <= limit < cost(kind, keep + 1)


def test_an_encode_stage_and_a_pyramid_share_the_budget() -> None:
    stages = {"diverse": {"use": "divprune/max-min", "keep": "solve"}, "pyramid": pyramid({8: "solve"})}
    numbers, plan = solved({"kv": 0.2}, stages)
    assert list(numbers.values()) == [plan.schedule().entry, plan.schedule().per_layer[-1]] == [217, 81]  # 0.377 twice
    assert 0.2 - 1 / 576 < kv(plan) <= 0.2


def test_a_boundary_is_the_one_of_the_highest_cost_within_the_budget() -> None:
    assert solved({"kv": 0.5}, {"v": {"use": "vtw/withdrawal", "at": "solve"}})[0] == {"stages.v.at": 16}
    assert solved({"kv": 0.49}, {"v": {"use": "vtw/withdrawal", "at": "solve"}})[0] == {"stages.v.at": 15}
    assert solved({"kv": 0.49}, {"i": {"use": "hidrop/late-injection", "at": "solve"}})[0] == {"stages.i.at": 17}
    late = {"use": "fastv/attention-rank", "at": "solve", "keep": 0.25}
    assert solved({"average_tokens": 288}, {"fastv": late})[0] == {"stages.fastv.at": 10}


def test_rescaled_numbers_and_varying_images_get_shares() -> None:
    tuned = {"tuned_for": {"layers": 32, "visual_tokens": 576}, "rescale": True}
    stages = {"inject": INJECT, "pyramid": pyramid({10: "solve", 14: 10, 16: 5, 18: 1}), "exit": EXIT}
    _, plan = solved({"average_tokens": 64}, stages, BackboneShape(12, 144), **tuned)
    assert plan.schedule().average == 16  # the budget is scaled, too
    _, plan = solved({"average_tokens": 0.1}, {"p": pyramid({0.1: "solve", 0.5: "solve"})}, BackboneShape(32, None))
    for size in (144, 576, 2000):
        assert (plan.schedule(size).average or 0) / size == pytest.approx(0.1, abs=0.004)


def test_layers_without_attention_hold_no_entries() -> None:
    hybrid = BackboneShape(8, 100, attending=(3, 7))
    numbers, _ = solved({"kv": 0.75}, {"c": {"use": "control/random", "keep": {4: "solve"}}}, hybrid)
    assert numbers == {"stages.c.keep.4": 50}  # layer 3 holds 100, layer 7 holds 50


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"budget": {"kv": 0.5}, "stages": {"p": pyramid({10: 5})}}, r"budget: no number is written as `solve`"),
        (
            {"stages": {"f": {"use": "fastv/attention-rank", "keep": "solve"}}},
            r"stages\.f\.keep: expected .*\nbudget: missing; `solve` needs one",
        ),
        (
            {"budget": {"kv": 0.5, "flops": 0.5}, "stages": {"p": pyramid({10: "solve"})}},
            r"budget: expected exactly one of average_tokens, flops and kv",
        ),
        ({"budget": {"kv": 2}, "stages": {"p": pyramid({10: "solve"})}}, r"budget\.kv: "),
        (
            {"budget": {"kv": 0.5}, "stages": {"t": {"use": "tome/token-merging", "r": "solve"}}},
            r"stages\.t\.r: cannot be solved; `solve` stands for a number of tokens or a boundary",
        ),
    ],
)
def test_faults_of_the_file(data: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dropflow.load_policy({"name": "faulty", **data})


@pytest.mark.parametrize(
    ("budget", "stages", "shape", "message"),
    [
        ({"average_tokens": 100}, {"p": pyramid({10: "solve"})}, LLAVA, r"100 cannot be met .* 180\.7 to 576"),
        ({"average_tokens": 600}, {"p": pyramid({10: "solve"})}, LLAVA, r"600 cannot be met .* 180\.7 to 576"),
        ({"average_tokens": 64}, {"p": pyramid({10: "solve"})}, BackboneShape(32, None), "write a share"),
        (
            {"kv": 0.5},
            {"p": pyramid({10: "solve"}), "e": {"use": "hidrop/early-exit", "at": "solve"}},
            LLAVA,
            r"one boundary or any number of token counts .* stages\.p\.keep\.10, stages\.e\.at",
        ),
        (
            {"kv": 0.5},
            {"m": {"use": "prumerge/prune-merge"}, "p": pyramid({10: "solve"})},
            LLAVA,
            "the data decides how many tokens",
        ),
    ],
)
def test_budgets_that_cannot_be_met(budget: Any, stages: Any, shape: BackboneShape, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        solved(budget, stages, shape)


def test_flops_need_widths() -> None:
    policy = dropflow.load_policy({"name": "x", "budget": {"flops": 0.5}, "stages": {"p": pyramid({10: "solve"})}})
    with pytest.raises(PolicyError, match=r"budget\.flops: needs the widths"):
        resolve(policy, LLAVA)


def test_marks_survive_as_plain_data_and_in_the_schema() -> None:
    data = {"name": "x", "budget": {"flops": 0.25}, "stages": {"p": pyramid(FOUR), "e": EXIT}}
    policy = dropflow.load_policy(data)
    assert dropflow.load_policy(policy.to_dict()) == policy
    assert policy.to_dict()["stages"]["p"]["keep"] == FOUR
    text = {**data, "stages": {"p": pyramid({"10": "solve"}), "e": EXIT | {"at": "solve"}}}
    assert not list(Draft202012Validator(schema()).iter_errors(text))


@pytest.mark.parametrize("budget", [{"average_tokens": 6.5}, {"flops": 0.3}, {"kv": 0.4}])
@torch.no_grad()
def test_an_attached_model_runs_and_records_what_was_solved(budget: dict[str, float], tmp_path: Path) -> None:
    stages = {"p": {"use": "control/stride", "keep": {1: "solve", 3: "solve"}}}
    model, inputs = tiny_llava(), prompt()
    with dropflow.attach(model, {"name": "x", "budget": budget, "stages": stages}) as flow:
        logits = model(**inputs).logits
        model.save_pretrained(tmp_path)
    counts = flow.plan.schedule().per_layer
    assert flow.report().average_visual_tokens == sum(map(int, counts)) / 6  # type: ignore[arg-type]
    keep = flow.policy.to_dict()["stages"]["p"]["keep"]
    assert [keep[1], keep[3]] == [counts[1], counts[3]]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with dropflow.attach(loaded):
        torch.testing.assert_close(loaded(**inputs).logits, logits)

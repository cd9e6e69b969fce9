"""Which stages can be mixed where, and how shipped policies are scaled to a budget."""

from __future__ import annotations

from functools import partial

import pytest

import dropflow
from dropflow import BackboneShape
from dropflow.backbone.flops import LLAVA_7B, vision_only
from dropflow.errors import PolicyError
from dropflow.policy.cost_budget import CostBudget
from dropflow.policy.plan import resolve
from dropflow.policy.registry import STAGES, names
from dropflow_lab.errors import InputError
from dropflow_lab.tune.methods import find_methods, methods_of
from dropflow_lab.tune.published import published
from dropflow_lab.tune.rescaled import rescaled

LLAVA, DIGITS = BackboneShape(32, 576), BackboneShape(12, 144)
WORK = partial(vision_only, shape=LLAVA_7B)


@pytest.mark.parametrize(
    ("use", "places"),
    [
        ("divprune/max-min", ["entry"]),
        ("cdpruner/conditional-dpp", ["prune", "entry"]),  # its boundary is 0 by default
        ("fastv/attention-rank", ["prune"]),
        ("hidrop/concave-pyramid", ["prune"]),
        ("control/stride", ["prune", "entry"]),
        ("visionzip/dominant-contextual", ["entry"]),
        ("hidrop/early-exit", ["exit"]),
        ("hidrop/late-injection", ["inject"]),
        ("mustdrop/output-aware-cache", []),  # takes tokens, but drops none in the prefill
        ("tome/token-merging", []),
    ],
)
def test_places_follow_from_hooks_and_options(use: str, places: list[str]) -> None:
    assert [method.place for method in methods_of(use)] == places


def test_every_method_makes_a_policy_that_a_budget_solves() -> None:
    solved, refused = 0, dict[str, str]()
    for method in (method for name in names(STAGES) for method in methods_of(name)):
        if method.place in ("entry", "prune"):
            data = {
                "name": "x",
                "budget": {"average_tokens": 20},
                "stages": {"one": method.options("solve", None if method.place == "entry" else 1)},
            }
            try:
                average = resolve(dropflow.load_policy(data), DIGITS).schedule().average
            except PolicyError as error:
                refused[method.use] = str(error)
                continue
            assert average is not None, method.use
            assert 16 <= average <= 20, method.use  # `mustdrop/spatial-merge` merges eight tokens at a time
            solved += 1
    assert solved >= 14
    assert all("the data decides how many tokens" in reason for reason in refused.values()), refused


def test_controls_and_late_entry_are_mixed_only_by_name() -> None:
    uses = {method.use for method in find_methods()}
    assert "divprune/max-min" in uses
    assert not {use for use in uses if use.startswith("control/")} | (uses & {"hidrop/late-injection"})
    assert [method.place for method in find_methods(["hidrop/late-injection"])] == ["inject"]
    with pytest.raises(InputError, match="did you mean 'divprune/max-min'"):
        find_methods(["divprune/maxmin"])
    with pytest.raises(InputError, match="takes no number of tokens"):
        find_methods(["tome/token-merging"])


@pytest.mark.parametrize("kind", ["average_tokens", "flops", "kv"])
def test_a_policy_is_scaled_to_a_budget_by_one_factor(kind: str) -> None:
    budget = CostBudget.model_validate({kind: 14 if kind == "average_tokens" else 0.0973})
    policy = rescaled(dropflow.load_policy("visionzip-64"), DIGITS, budget, WORK)
    assert policy.to_dict()["stages"]["zip"]["dominant"] == 12  # 54 and 10 of 576 tokens
    assert policy.to_dict()["stages"]["zip"]["contextual"] == 2
    assert resolve(policy, DIGITS).schedule().average == 14


def test_boundaries_are_scaled_to_the_depth_and_counts_to_the_budget() -> None:
    policy = rescaled(dropflow.load_policy("hidrop-64"), DIGITS, CostBudget(average_tokens=20), WORK)
    stages = policy.to_dict()["stages"]
    assert (stages["inject"]["at"], list(stages["pyramid"]["keep"]), stages["exit"]["at"]) == (3, [4, 5, 6, 7], 9)
    assert 18 <= (resolve(policy, DIGITS).schedule().average or 0) <= 20
    again = rescaled(dropflow.load_policy("hidrop-64"), LLAVA, CostBudget(average_tokens=64), WORK)
    assert again.to_dict()["stages"]["pyramid"]["keep"] == {10: 215, 14: 10, 16: 5, 18: 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vtw-16", "costs at least 72 with its boundaries, more than 14"),
        ("prumerge", "the data decides how many tokens it leaves"),
        ("tome-r8", "costs at most 1 within 14"),
    ],
)
def test_what_cannot_be_scaled_says_why(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        rescaled(dropflow.load_policy(name), DIGITS, CostBudget(average_tokens=14), WORK)


def test_compact_policies_are_tried_with_persistent_positions_too() -> None:
    found = published(["divprune-56", "hidrop-64"])
    names_and_positions = [(policy.name, policy.positions) for policy in found]
    assert names_and_positions == [
        ("divprune-56", "compact"),
        ("divprune-56-persistent", "persistent"),
        ("hidrop-64", "persistent"),
    ]
    with pytest.raises(PolicyError, match="divprune-65"):
        published(["divprune-65"])

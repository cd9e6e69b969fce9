"""The search: verdicts question by question, hopeless policies given up, the same course for any number of workers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dropflow
from dropflow import BackboneShape
from dropflow.policy.cost_budget import CostBudget
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import Sample, read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.store.claims import Taken
from dropflow_lab.store.finished import Finished
from dropflow_lab.tune import judge as judging
from dropflow_lab.tune.judge import Judge, hopeless
from dropflow_lab.tune.methods import find_methods
from dropflow_lab.tune.published import published
from dropflow_lab.tune.space import Space, mutated
from dropflow_lab.tune.study import Search, Searched, search
from dropflow_lab.tune.tune import closer

optuna = pytest.importorskip("optuna")

METHODS = ["control/stride", "divprune/max-min", "fastv/attention-rank", "hidrop/early-exit"]
BUDGET = CostBudget(average_tokens=40)
HOW = Search(trials=5, generation=2, seed=3)


@pytest.fixture(scope="module")
def subject(model_folder: Path) -> tuple[Any, Any]:
    return load_model(model_folder)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_samples("digits", 6, 3)


def judge(subject: tuple[Any, Any], samples: list[Sample], folder: Path) -> Judge:
    return Judge(*subject, samples, Finished(folder), 3, 2)


def searched(subject: tuple[Any, Any], samples: list[Sample], folder: Path, how: Search = HOW) -> Searched:
    starts = published(["divprune-56", "vtw-16"])
    return search(judge(subject, samples, folder), BUDGET, find_methods(METHODS), starts, how)


def told(found: Searched) -> list[Any]:
    return [(trial.policy.to_dict(), trial.verdict, trial.relative) for trial in found.trials]


@pytest.fixture(scope="module")
def first(subject: tuple[Any, Any], samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("first")
    return searched(subject, samples, folder), folder


def test_it_tries_the_published_ones_and_then_its_own_within_the_budget(first: Any) -> None:
    found, _ = first
    own = [trial for trial in found.trials if not trial.published]
    assert [trial.policy.name for trial in found.trials if trial.published] == [
        "divprune-56",
        "divprune-56-persistent",
    ]
    assert list(found.refused) == ["vtw-16"]
    assert "costs at least 72 with its boundaries, more than 40" in found.refused["vtw-16"]
    assert [trial.policy.name for trial in own] == [f"tuned-{number}" for number in range(5)]
    assert own[0].parameters["entry"] == "divprune/max-min"  # it starts from where the published ones are
    for trial in found.trials:
        assert 0 < trial.verdict.average_tokens <= 40 + 1e-6
        assert trial.policy.budget is None
    assert found.best.relative == min(trial.relative for trial in found.trials if not trial.verdict.stopped)
    keys = [str(trial.policy.to_dict()["stages"]) + trial.policy.positions for trial in own]
    assert len(set(keys)) == len(keys)


def test_an_interrupted_search_continues_to_the_same_end(
    first: Any, subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = first
    asked: list[str] = []
    real = Judge._ask

    def killed(self: Judge, policy: dropflow.Policy, rival: Any) -> Any:
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(policy.name)
        return real(self, policy, rival)

    monkeypatch.setattr(Judge, "_ask", killed)
    with pytest.raises(KeyboardInterrupt):
        searched(subject, samples, tmp_path)
    asked.insert(0, "so that it goes on")
    again = searched(subject, samples, tmp_path)
    assert told(again) == told(found)
    assert len(asked) == 1 + len(found.trials)  # nothing is asked twice


def test_what_another_process_is_judging_is_put_off(
    first: Any, subject: tuple[Any, Any], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = first
    real = judging.Judge.verdict
    busy = {"divprune-56": 2, "tuned-1": 1, "tuned-4": 3}

    def verdict(self: Judge, policy: dropflow.Policy, rival: Any = ()) -> Any:
        if busy.get(policy.name):
            busy[policy.name] -= 1
            raise Taken
        return real(self, policy, rival)

    monkeypatch.setattr(judging.Judge, "verdict", verdict)
    assert told(searched(subject, samples, folder)) == told(found)
    assert set(busy.values()) == {0}


def test_another_seed_takes_another_course(first: Any, subject: tuple[Any, Any], samples: list[Sample]) -> None:
    found, folder = first
    other = searched(subject, samples, folder, replace(HOW, seed=4))
    assert told(other)[:2] == told(found)[:2]  # the published ones
    assert told(other) != told(found)


def test_a_verdict_counts_every_question(subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path) -> None:
    whole = dropflow.load_policy({"name": "whole", "stages": {"keep": {"use": "control/keep-all"}}})
    blind = dropflow.load_policy({"name": "blind", "stages": {"exit": {"use": "hidrop/early-exit", "at": 0}}})
    asked = judge(subject, samples, tmp_path)
    same, far = asked.verdict(whole), asked.verdict(blind)
    assert same.kl == (0.0,) * 6
    assert same.same == (True,) * 6
    assert same.right == tuple(asked.dense())
    assert (same.flops, same.kv, same.average_tokens, same.stopped) == (1, 1, 144, False)
    assert far.distance > 0
    assert far.average_tokens == 0
    given_up = asked.verdict(blind, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert given_up.stopped
    assert given_up.kl == far.kl[:3]


@pytest.mark.parametrize(
    ("own", "rival", "expected"),
    [
        ([1.0, 1.1, 0.9, 1.0], [0.1, 0.2, 0.1, 0.1, 5.0], True),
        ([1.0, 0.0, 0.9, 0.0], [0.1, 0.9, 0.1, 0.5], False),  # higher on average, but not clearly
        ([0.1, 0.2, 0.1], [1.0, 1.0, 1.0], False),
        ([1.0, 1.0], [], False),
        ([], [1.0], False),
    ],
)
def test_a_policy_is_given_up_when_it_is_clearly_further(own: Any, rival: Any, expected: bool) -> None:
    assert hopeless(own, rival) is expected


def test_the_interval_of_a_paired_difference() -> None:
    mean, low, high = closer([0.1, 0.2, 0.3, 0.4], [1.1, 1.0, 1.5, 1.2])
    assert mean == pytest.approx(0.95)
    assert (high - mean, mean - low) == pytest.approx((1.95996 * 0.1914854 / 2,) * 2, rel=1e-5)


def test_mutants_stay_in_the_space() -> None:
    space = Space(find_methods(), BackboneShape(12, 144), BUDGET)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    chance = random.Random(1)
    for number in range(30):
        trial = study.ask()
        space.policy(trial, "x")
        changed = mutated(trial.params, trial.distributions, chance)
        different = [name for name in changed if changed[name] != trial.params[name]]
        assert len(different) <= 2, number
        for name, kind in trial.distributions.items():
            assert kind._contains(kind.to_internal_repr(changed[name])), name


def test_a_policy_lies_where_its_parameters_put_it() -> None:
    space = Space(find_methods(), BackboneShape(12, 144), BUDGET)
    mixed = {
        "name": "x",
        "stages": {
            "first": {"use": "cdpruner/conditional-dpp", "keep": 60},
            "then": {"use": "hidrop/concave-pyramid", "keep": {4: 30, 8: 10}},
            "end": {"use": "vtw/withdrawal", "at": 10},
        },
    }
    place = space.parameters_of(dropflow.load_policy(mixed))
    assert place is not None
    data = space.policy(optuna.trial.FixedTrial(place | {"entry.cdpruner/conditional-dpp.theta?": False}), "y")
    assert data["stages"] == {
        "entry": {"use": "cdpruner/conditional-dpp", "keep": 60},
        "prune-1": {"use": "hidrop/concave-pyramid", "keep": {4: "solve"}},
        "prune-2": {"use": "hidrop/concave-pyramid", "keep": {8: "solve"}},
        "exit": {"use": "vtw/withdrawal", "at": 10},
    }
    merged = {"name": "x", "stages": {"merge": {"use": "tome/token-merging"}}}
    assert space.parameters_of(dropflow.load_policy(merged)) is None


def test_a_budget_that_nothing_fits_is_refused(subject: tuple[Any, Any], samples: list[Sample], tmp_path: Path) -> None:
    asked = judge(subject, samples, tmp_path)
    with pytest.raises(InputError, match="no policy fits this model"):
        search(asked, CostBudget(average_tokens=400), find_methods(["divprune/max-min"]), [], HOW)

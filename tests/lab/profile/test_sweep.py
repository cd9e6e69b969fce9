"""Answers under a policy compared with the model's own and with the right ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dropflow.policy.policy import policy_from_dict
from dropflow_lab.inputs.data import Sample, read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.profile.sweep import (
    Answers,
    Tally,
    answer_kl,
    end_tokens,
    generate,
    same_answers,
    shared_positions,
)

END = 9


@pytest.mark.parametrize(
    ("dense", "given", "shared", "same"),
    [
        ([1, 2, END, 0], [1, 2, END, 0], [1, 1, 1, 0], True),
        ([1, 2, END, 0], [1, 2, END, 5], [1, 1, 1, 0], True),  # what follows the end does not count
        ([1, 2, END, 0], [1, 3, END, 0], [1, 1, 0, 0], False),  # at the second they have read the same
        ([1, 2, END, 0], [1, END, 0, 0], [1, 1, 0, 0], False),
        ([4, 2, 3, 1], [4, 2, 3, 1], [1, 1, 1, 1], True),  # cut off
        ([1, 2, 3, END], [5, 2, 3, END], [1, 0, 0, 0], False),
    ],
)
def test_positions_up_to_the_first_that_differs(dense, given, shared, same) -> None:
    one, two = torch.tensor([dense]), torch.tensor([given])
    assert shared_positions(one, two, [END]).int().tolist() == [shared]
    assert same_answers(one, two, [END]).tolist() == [same]


@pytest.mark.parametrize(
    ("dense", "given", "same"),
    [([1, END, 0, 0], [1, END], True), ([1, 2, 3, END], [1, END], False), ([1, END], [1, 2, END], False)],
)
def test_answers_of_different_length(dense, given, same) -> None:
    assert same_answers(torch.tensor([dense]), torch.tensor([given]), [END]).tolist() == [same]


def test_kl_is_that_of_the_definition_over_the_counted_positions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = float((p * np.log(p / q)).sum())
    dense = torch.tensor(np.log([[p, p, p]])).float()
    given = torch.tensor(np.log([[q, p, q]])).float() + 3  # a shift of logits changes nothing
    assert answer_kl(dense, given, torch.tensor([[True, True, False]])).item() == pytest.approx(expected / 2, abs=1e-6)
    assert answer_kl(dense, dense, torch.ones(1, 3).bool()).item() == 0.0


def test_accuracy_counts_only_samples_with_an_answer() -> None:
    tokens = torch.tensor([[1, END], [2, END], [3, END]])
    given = Answers(tokens, torch.zeros(3, 2, 10), ["1", "2", "3"])
    tally = Tally()
    tally.add([Sample((), "?", "1"), Sample((), "?", "7"), Sample((), "?")], given, given, [END])
    assert (tally.quality().accuracy, tally.quality().agreement, tally.quality().kl) == (0.5, 1.0, 0.0)
    unknown = Tally()
    unknown.add([Sample((), "?")] * 3, given, given, [END])
    assert (unknown.quality().accuracy, unknown.quality().score) == (None, 1.0)


def test_a_policy_that_changes_nothing_agrees_and_one_that_blinds_diverges(model_folder) -> None:
    model, processor = load_model(model_folder)
    batch = read_samples("digits", 3, 4)
    inputs = build_inputs(processor, [(s.images(), s.question) for s in batch]).to(model.device, model.dtype)
    dense = generate(model, processor, inputs, None, 3)
    ends, tallies = end_tokens(model), {}
    for at in (4, 0):
        policy = policy_from_dict({"name": "exit", "stages": {"exit": {"use": "hidrop/early-exit", "at": at}}})
        tallies[at] = Tally()
        tallies[at].add(batch, dense, generate(model, processor, inputs, policy, 3), ends)
    same, blind = tallies[4].quality(), tallies[0].quality()
    assert (same.agreement, same.kl) == (1.0, 0.0)
    assert blind.kl > 0
    assert ends == (model.config.text_config.eos_token_id,)

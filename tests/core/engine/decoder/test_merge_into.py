"""Merging inside the LLM: averaging states before a layer equals a masked run that averages them as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from watching import told, watched

import dropflow
from dropflow import Keep, PruneCall, Stage, hookimpl
from dropflow.errors import DecisionError
from dropflow.operators.merging import mean_into
from dropflow.testing import MaskedOracle


class Pairs(Stage[Any]):
    """Merges every second remaining token of each image into the one before it, and drops it."""

    prune_at = (1, 3)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        into = torch.arange(call.image_id.shape[1]).repeat(len(call.image_id), 1)
        for sample, own in enumerate(call.image_id):
            for image in set(own[own >= 0].tolist()):
                slots = (own == image).nonzero()[:, 0]
                into[sample, slots[1::2]] = slots[: len(slots) // 2 * 2 : 2]
        return Keep(into == torch.arange(into.shape[1]), merge_into=into)


PAIRS = policy(pairs={"use": Pairs})


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_merged_run_equals_the_masked_run_that_merges(llava: Any, side: str) -> None:
    inputs = prompt(side=side)
    with dropflow.attach(llava, PAIRS) as flow:
        logits, live, merges = llava(**inputs).logits, flow.live(), flow.merges()
    visual = inputs["input_ids"] == IMAGE
    assert [(own & visual).sum(1).tolist() for own in live[::2]] == [[16, 32, 0], [8, 16, 0], [4, 8, 0]]
    with MaskedOracle(llava, live, merges=merges):
        expected = llava(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5
    with MaskedOracle(llava, live):
        assert relative_error(logits[real], llava(**inputs, use_cache=False).logits[real]) > 1e-3


@pytest.mark.parametrize("mode", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generated_tokens_equal_the_masked_run_without_cache(llava: Any, mode: dict[str, int]) -> None:
    inputs = prompt()
    budget = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **mode}
    with dropflow.attach(llava, PAIRS) as flow:
        tokens = llava.generate(**inputs, **budget)
        beams = mode["num_beams"]
        live, merges = flow.live()[:, ::beams], {b: into[::beams] for b, into in flow.merges().items()}
    with MaskedOracle(llava, live, merges=merges):
        assert torch.equal(tokens, llava.generate(**inputs, **budget, use_cache=False))


class Reversed(Stage[Any]):
    """Keeps the first half of each image, reversed, and merges the last token into its last slot."""

    prune_at = (1, 3)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        into = torch.arange(call.image_id.shape[1]).repeat(len(call.image_id), 1)
        keep = call.image_id < 0
        for sample, own in enumerate(call.image_id):
            for image in set(own[own >= 0].tolist()):
                slots = (own == image).nonzero()[:, 0]
                half = slots[: len(slots) // 2]
                into[sample, half], keep[sample, half] = half.flip(0), True
                into[sample, slots[-1]] = half[-1]
        return Keep(keep, merge_into=into)


@torch.no_grad()
def test_tokens_that_stay_may_change_places_as_in_the_masked_run(llava: Any) -> None:
    inputs, budget = prompt(), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with dropflow.attach(llava, policy(reverse={"use": Reversed})) as flow:
        logits, tokens = llava(**inputs).logits, llava.generate(**inputs, **budget)
        live, merges = flow.live(), flow.merges()
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    assert live[1][0, visual].nonzero()[:, 0].tolist() == list(range(8))
    assert merges[1][0, visual].tolist() == [*visual[:8].flip(0).tolist(), *visual[8:15].tolist(), int(visual[7])]
    with MaskedOracle(llava, live, merges=merges):
        expected = llava(**inputs, use_cache=False).logits
        assert torch.equal(tokens, llava.generate(**inputs, **budget, use_cache=False))
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5


NEIGHBOURS = {
    "protected": {"key": {"use": "mustdrop/key-set", "share": 0.25}},
    "dropped by another stage": {"cut": {"use": "fastv/attention-rank", "at": 1, "keep": 12}},
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
@torch.no_grad()
def test_places_that_others_speak_of_are_not_moved(llava: Any, neighbour: dict[str, Any]) -> None:
    inputs = prompt()
    plain = llava(**inputs).logits
    with (
        dropflow.attach(llava, policy(**neighbour, reverse={"use": Reversed})),
        pytest.raises(DecisionError, match=r"stages\.reverse: at boundary 1 `prune` moves kept tokens"),
    ):
        llava(**inputs)
    assert torch.equal(llava(**inputs).logits, plain)
    with dropflow.attach(llava, policy(**neighbour, pairs={"use": Pairs})):
        llava(**inputs)  # a merge that moves nothing is no fault


@torch.no_grad()
def test_observers_see_who_was_merged_into_whom(llava: Any) -> None:
    with dropflow.attach(llava, watched(pairs={"use": Pairs})) as flow:
        llava(**prompt([(3, "I", 5)]))
    events = told(flow)
    expected = list(range(25))
    assert [event.boundary for event in events] == [0, 1, 3]
    assert events[0].merged_into is None
    assert events[1].merged_into is not None
    expected[5:20:2] = expected[4:20:2]
    assert events[1].merged_into[0].tolist() == expected
    expected = list(range(25))
    expected[6:20:4] = expected[4:20:4]
    assert events[2].merged_into is not None
    assert events[2].merged_into[0].tolist() == expected


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 6), min_size=7, max_size=7), min_size=1, max_size=3), st.booleans())
def test_a_slot_holds_the_mean_of_all_that_name_it(named: list[list[int]], half: bool) -> None:
    into = torch.tensor(named)
    states = torch.randn(len(named), 7, 3, generator=torch.Generator().manual_seed(0))
    states = states.half() if half else states
    found = mean_into(states, into)
    assert found.dtype == states.dtype
    for sample, row in enumerate(into.tolist()):
        for slot in range(7):
            members = [member for member in range(7) if row[member] == slot] or [slot]
            expected = states[sample, members].double().mean(0).to(states.dtype) if len(members) > 1 else None
            if expected is None:
                assert torch.equal(found[sample, slot], states[sample, members[0]])
            else:
                assert (found[sample, slot] - expected).abs().max() < (2e-3 if half else 1e-6)


def test_means_of_half_precision_are_taken_in_float32() -> None:
    states = torch.tensor([60000.0, 60000.0, 1.0, 2**-11, 2**-11], dtype=torch.float16).view(1, 5, 1)
    into = torch.tensor([[0, 0, 2, 2, 2]])
    found = mean_into(states, into)[0, :, 0]
    assert found[:2].tolist() == [60000.0, 60000.0], "the sum has overflowed"
    exact = torch.tensor((1 + 2 * 2**-11) / 3)  # summed in float16, both small ones would be lost
    assert found[2] == exact.half()
    assert found[2] != torch.tensor(1 / 3).half()


def answering(into: Any, stages: int = 1, mask: Any = None) -> dict[str, Any]:
    """A policy whose stages merge by `into(call)` at boundary 2 and keep what `mask` of it says, by default all."""

    class Answers(Stage[Any]):
        prune_at = (2,)

        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            slots = into(call)
            return Keep(torch.ones_like(call.valid) if mask is None else mask(slots), merge_into=slots)

    return policy(**{f"s{number}": {"use": Answers} for number in range(stages)})


def own_slots(call: PruneCall) -> torch.Tensor:
    return torch.arange(call.image_id.shape[1]).repeat(len(call.image_id), 1)


def moved(slot: int, target: int) -> Any:
    """Every token's own slot, except for one token of the first sample."""

    def into(call: PruneCall) -> torch.Tensor:
        found = own_slots(call)
        found[0, slot] = target
        return found

    return into


def unmerged(into: torch.Tensor) -> torch.Tensor:
    return into == torch.arange(into.shape[1])


def chained(call: PruneCall) -> torch.Tensor:
    found = own_slots(call)
    found[0, 5], found[0, 6] = 4, 5
    return found


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (answering(lambda call: own_slots(call).float()), r"stages\.s0: at boundary 2 .* torch.float32 \(1, 27\)"),
        (answering(lambda call: own_slots(call)[:, 1:]), r"expected torch.int64 \(1, 27\)"),
        (answering(moved(4, 2)), "into no slot of its own image"),
        (answering(moved(4, 25)), "into no slot of its own image"),
        (answering(moved(4, 99)), "into no slot of its own image"),
        (answering(chained, mask=unmerged), "or into one that is merged too and dropped"),
        (answering(own_slots, 2), r"stages\.s1: another stage already merges tokens at boundary 2"),
    ],
)
@torch.no_grad()
def test_a_merge_that_makes_no_sense_is_refused_and_the_model_still_works(
    llava: Any, which: dict[str, Any], message: str
) -> None:
    inputs = prompt([(3, "I", 7)])
    plain = llava(**inputs).logits
    with dropflow.attach(llava, which), pytest.raises(DecisionError, match=message):
        llava(**inputs)
    assert torch.equal(llava(**inputs).logits, plain)


@torch.no_grad()
def test_what_is_said_of_text_is_ignored_and_merging_nothing_changes_no_bit(llava: Any) -> None:
    inputs = prompt([(3, "I", 7)])
    with dropflow.attach(llava, answering(moved(1, 2))):
        assert torch.equal(llava(**inputs).logits, llava(**inputs).logits)
        flowing = llava(**inputs).logits
    assert torch.equal(flowing, llava(**inputs).logits)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def test_gradients_flow_through_merged_states() -> None:
    model, inputs = tiny_llava(), prompt([(3, "I", 7)])
    inputs["labels"] = torch.where(torch.arange(27) >= 24, inputs["input_ids"], -100)
    with dropflow.attach(model, PAIRS) as flow:
        model(**inputs).loss.backward()
        live, merges = flow.live(), flow.merges()
    got = gradients(model)
    with MaskedOracle(model, live, merges=merges):
        model(**inputs, use_cache=False).loss.backward()
    expected = gradients(model)
    assert got.keys() == expected.keys()
    felt = {name for name, gradient in expected.items() if gradient.abs().max() > 1e-6}
    assert "model.multi_modal_projector.linear_1.weight" in felt
    assert all(relative_error(got[name], expected[name]) < 1e-3 for name in felt)

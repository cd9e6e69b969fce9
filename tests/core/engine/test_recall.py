"""A later question chooses anew among all visual tokens, while earlier turns keep what they saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import HIDROP, IMAGE, MIXED, PAD, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import DynamicCache

import dropflow
from dropflow import Budget, Forecast, Keep, PruneCall, Stage, StageOptions, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.decoder.parked import parked_in
from dropflow.engine.tokens.cache import flow_layers
from dropflow.engine.tokens.cache_index import PADDING
from dropflow.errors import PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.operators import keep_top
from dropflow.testing.families import tiny_models
from dropflow.testing.recalled import Conversation, turns_beside


class ByStates(Stage[StageOptions]):
    """Keeps the five tokens whose states and values of layer 1 point most along the instruction tokens' states."""

    taps = (1,)
    reads_states = True
    ranks = False

    def forecast(self) -> Forecast:
        """Five tokens from boundary 3 on."""
        return Forecast(keeps={3: Budget(tokens=5)})

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Rank by what layer 1 returned, its values, and its attention."""
        states, values = call.states(1), call.values(1)
        own = call.instruction_slots[:, -1:]
        asked = states.gather(1, own[..., None].expand(-1, -1, states.shape[2]))
        rows = call.attention_rows(1, own)[:, :, 0]
        score = (states * asked).sum(2) + values.norm(dim=3).sum(1)
        score = score + 10 * rows[:, :, rows.shape[2] - states.shape[1] :].mean(1)
        return Keep(keep_top(score, call.image_id, [5] * len(call.image_sizes)))


FASTV = {**policy(rank={"use": "fastv/attention-rank", "at": 2, "keep": 5}), "recall": True}
POLICIES = {
    "fastv": FASTV,
    "hidrop": {**HIDROP, "recall": True},
    "shares": {**policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 0.4, 4: 2}}), "recall": True},
    "before all layers": {**policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {0: 6, 3: 2}}), "recall": True},
    "at the entry": {
        **policy(
            inject={"use": "hidrop/late-injection", "at": 2}, rank={"use": "hidrop/concave-pyramid", "keep": {2: 6}}
        ),
        "recall": True,
    },
    "encode": {
        **policy(few={"use": "divprune/max-min", "keep": 9}, rank={"use": "fastv/attention-rank", "at": 3, "keep": 4}),
        "recall": True,
    },
    "protected": {
        **policy(
            keys={"use": "mustdrop/key-set", "share": 0.2}, rank={"use": "fastv/attention-rank", "at": 2, "keep": 5}
        ),
        "recall": True,
    },
    "features": {
        **policy(
            merge={"use": "mustdrop/spatial-merge", "at": 1, "window": [2, 2], "threshold": -1.0},
            rank={"use": "fastv/attention-rank", "at": 3, "keep": 2},
        ),
        "recall": True,
    },
    "states": {**policy(states={"use": ByStates}), "recall": True},
    "raters": {**policy(text={"use": "sparsevlm/text-guided", "keep": {2: 7, 4: 3}, "recycle": False}), "recall": True},
    "parts": {**policy(pyramid={"use": "pyramiddrop/pyramid", "keep": {2: 8, 4: 3}}), "recall": True},
}


def check(
    model: Any, which: dict[str, Any], first: dict[str, Any], turns: Sequence[dict[str, Any]], visual: Tensor
) -> list[Tensor]:
    """Compare a conversation with its definition, call by call; returns what was held after every call."""
    with dropflow.attach(model, which) as flow:
        found, helds = turns_beside(model, model.get_decoder(), flow, first, turns, visual)
    assert len(found) == len(helds) == 1 + len(turns)
    for logits, expected in found:
        assert logits.numel() > 0
        assert relative_error(logits, expected) < 2e-5
    return helds


TURNS = ([11, 12, 13], [21, 22, 23, 24, 25], [31])


def turns(batch: int, rows: Sequence[Sequence[int]] = TURNS) -> list[dict[str, Any]]:
    """Later turns, the same for all samples but for a word."""
    return [{"input_ids": torch.tensor([[*row[:-1], row[-1] + sample] for sample in range(batch)])} for row in rows]


@pytest.mark.parametrize("samples", [((3, "I", 5),), MIXED], ids=["one", "ragged"])
@pytest.mark.parametrize("which", POLICIES)
@torch.no_grad()
def test_turns_equal_those_of_the_definition(llava: Any, which: str, samples: Any) -> None:
    first = prompt(samples)
    visual = first["input_ids"] == IMAGE
    helds = check(llava, POLICIES[which], first, turns(len(samples)), visual)
    chosen = [held[4][:, : visual.shape[1]][visual] for held in helds]
    assert any(not torch.equal(chosen[0], later) for later in chosen[1:])
    assert which == "raters" or len({int(held.sum()) for held in chosen}) == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_padded_turns_equal_those_of_the_definition(attention: str) -> None:
    first = prompt(((3, "I", 5), ("I", 9), ("I", 2)))
    own = turns(3)[:2]
    own[0] |= {"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]])}
    own[1] |= {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])}
    visual = first["input_ids"] == IMAGE
    helds = check(tiny_llava(attention=attention), POLICIES["hidrop"], first, own, visual)
    before = visual.shape[1]
    assert [held.shape[2] for held in helds] == [before, before + 3, before + 8]
    assert helds[2][2:, :, before:].eq(torch.cat([turn["attention_mask"] for turn in own], 1).bool()).all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_next"])
@pytest.mark.parametrize("which", ["fastv", "hidrop", "before all layers"])
@torch.no_grad()
def test_turns_equal_those_of_the_definition_on_other_families(family: str, which: str) -> None:
    adapter, tiny = tiny_models()[family]
    model = tiny.model("sdpa")
    inputs, _ = tiny.prompt(((3, "I", 5),), side="left")
    visual = adapter(model).placeholders(inputs["input_ids"])
    more = turns(1)
    if "mm_token_type_ids" in inputs:
        for turn in more:
            turn["mm_token_type_ids"] = torch.zeros_like(turn["input_ids"])
    helds = check(model, POLICIES[which], dict(inputs), more, visual)
    assert all(0 < held[4, :, : visual.shape[1]][visual].sum() < visual.sum() for held in helds)


@torch.no_grad()
def test_entries_stay_in_order_and_are_counted(llava: Any) -> None:
    first = prompt(MIXED)
    with dropflow.attach(llava, POLICIES["hidrop"]):
        conversation = Conversation(llava, 3)
        for turn in (first, *turns(3)):
            conversation.ask(turn)
            for layer in flow_layers(conversation.cache).values():
                index = layer.full_index()
                shown = index.image_id != PADDING
                shown = shown if index.valid is None else shown & index.valid
                steps = index.logical.masked_fill(~shown, -1).diff(dim=1)
                assert bool((steps > 0)[shown[:, 1:]].all())
                if index.dropped is not None:
                    assert torch.equal(conversation.mask.sum(1) - index.dropped, shown.sum(1))


@torch.no_grad()
def test_the_choice_is_that_of_asking_first(llava: Any) -> None:
    """At boundary 0 nothing but the question's own words decides: the second turn keeps what it would keep first."""
    first, second = prompt(((3, "I", 5),)), {"input_ids": torch.tensor([[11, 12, 13]])}
    stages = policy(rank={"use": "control/stride", "keep": {2: 4}})
    with dropflow.attach(llava, {**stages, "recall": True}):
        conversation = Conversation(llava, len(first["input_ids"]))
        (_, once), (_, again) = conversation.ask(first), conversation.ask(second)
    assert torch.equal(again[..., : once.shape[2]], once)


@torch.no_grad()
def test_without_recall_dropped_tokens_stay_gone(llava: Any) -> None:
    first, visual = prompt(((3, "I", 5),)), prompt(((3, "I", 5),))["input_ids"] == IMAGE
    found = []
    for recall in (False, True):
        with dropflow.attach(llava, {**FASTV, "recall": recall}):
            conversation = Conversation(llava, len(first["input_ids"]))
            held = [conversation.ask(turn)[1][3][:, : visual.shape[1]][visual] for turn in (first, *turns(1))]
            found.append([torch.equal(held[0], later) for later in held[1:]])
            assert (parked_in(conversation.cache) is not None) == recall
    assert found[0] == [True, True, True]
    assert found[1] != [True, True, True]


@torch.no_grad()
def test_steps_may_read_less_of_what_was_recalled(llava: Any) -> None:
    first, question = prompt(((3, "I", 5),)), torch.tensor([[11, 12, 13]])
    found, read = [], []
    for share in (None, 1.0, 0.4):
        stages = {} if share is None else {"read": {"use": "visionpulse/decode-read", "at": 3, "fixed": share}}
        which = {**FASTV, "stages": {**FASTV["stages"], **stages}}
        with dropflow.attach(llava, which) as flow:
            cache = DynamicCache()
            logits = [llava(**first, **{CACHE_ARGUMENT: cache}).logits[:, -1]]
            for ids in (*question.T[:2], question, *question.T):
                logits.append(llava(input_ids=ids.view(1, -1), **{CACHE_ARGUMENT: cache}).logits[:, -1])
            found.append(logits)
            read.append(flow.report().kv_entries_read_over_time)
    assert all(map(torch.equal, found[0], found[1]))
    assert torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][1], found[2][1])
    assert read[0] == read[1]
    assert sum(read[2]) < sum(read[1])


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@torch.no_grad()
def test_generate_goes_on_with_it(llava: Any, mode: dict[str, Any]) -> None:
    """`generate` on the cache of an answer equals calls of the model with the same tokens."""
    first, budget = prompt(((3, "I", 5),)), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | mode
    with dropflow.attach(llava, POLICIES["hidrop"]):
        cache = DynamicCache(config=llava.config)
        torch.manual_seed(0)
        ids = llava.generate(**first, **budget, **{CACHE_ARGUMENT: cache})
        if "num_beams" in mode:
            cache.batch_select_indices(torch.tensor([0]))
        question = torch.cat((ids, torch.tensor([[11, 12, 13]])), 1)
        again = llava.generate(
            input_ids=question,
            attention_mask=torch.ones_like(question),
            **{CACHE_ARGUMENT: cache},
            do_sample=False,
            max_new_tokens=4,
            min_new_tokens=4,
        )
        if mode:
            return
        conversation = Conversation(llava, len(first["input_ids"]))
        conversation.ask(first)
        for token in ids[0, first["input_ids"].shape[1] : -1]:
            conversation.ask({"input_ids": token.view(1, 1)})
        logits, _ = conversation.ask({"input_ids": question[:, ids.shape[1] - 1 :]})
        assert int(logits[0, -1].argmax()) == int(again[0, question.shape[1]])


@torch.no_grad()
def test_parked_tokens_follow_their_samples(llava: Any) -> None:
    first, second = prompt(((3, "I", 5), ("I", 9))), turns(2)[0]
    with dropflow.attach(llava, POLICIES["hidrop"]):
        plain, turned = Conversation(llava, len(first["input_ids"])), Conversation(llava, len(first["input_ids"]))
        plain.ask(first)
        turned.ask(first)
        expected, _ = plain.ask(second)
        order = torch.tensor([1, 0])
        turned.cache.batch_select_indices(order)
        turned.mask, turned.ids = turned.mask[order], turned.ids[order]
        found, _ = turned.ask({"input_ids": second["input_ids"][order]})
    assert relative_error(found, expected[order]) < 1e-5


@torch.no_grad()
def test_a_second_image_joins_what_is_parked(llava: Any) -> None:
    first, more = prompt(((3, "I", 5),)), prompt(((2, "I", 3),), seed=5)
    with dropflow.attach(llava, FASTV):
        conversation = Conversation(llava, len(first["input_ids"]))
        conversation.ask(first)
        conversation.ask(more)
        parked = parked_in(conversation.cache)
        assert parked is not None
        assert parked.logical.tolist() == [[*range(4, 20), *range(28, 44)]]
        assert parked.image_id.tolist() == [[0] * 16 + [1] * 16]
        _, held = conversation.ask(turns(1)[0])
    assert [int(held[3, 0, part].sum()) for part in (slice(4, 20), slice(28, 44))] == [5, 5]
    assert parked.nbytes > 4 * 32 * 32 * 3


def test_what_cannot_be_recalled_is_refused(llava: Any) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({**policy(few={"use": "divprune/max-min", "keep": 5}), "recall": True}, "no stage prunes in the LLM"),
        ({**FASTV, "positions": "compact"}, "use `positions: persistent`"),
        (
            {
                **policy(
                    rank={"use": "fastv/attention-rank", "at": 2, "keep": 5},
                    cache={"use": "mustdrop/output-aware-cache", "at": 2},
                ),
                "recall": True,
            },
            "recall: stages.cache evicts entries",
        ),
    ]
    for which, message in refused:
        with pytest.raises(PolicyError, match=message):
            dropflow.attach(llava, which)
    adapter, tiny = tiny_models()["gemma3"]
    with pytest.raises(PolicyError, match="layer 0 is of kind 'sliding_attention'"):
        dropflow.attach(tiny.model("sdpa"), FASTV, adapter=adapter)


def test_families_whose_image_tokens_see_each_other_are_refused_before_a_layer_runs() -> None:
    adapter, tiny = tiny_models()["paligemma"]
    model, (inputs, _) = tiny.model("sdpa"), tiny.prompt(((2, "I", 3),), side="left")
    ran: list[int] = []
    with dropflow.attach(model, FASTV, adapter=adapter) as flow, torch.no_grad():
        model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: ran.append(0))
        with pytest.raises(UnsupportedModel, match="recall: this model lets tokens see later ones"):
            model(**inputs)
        assert not ran
        assert flow.attached


def test_training_goes_on_from_no_parked_tokens(llava: Any) -> None:
    first = prompt(((3, "I", 5),))
    with dropflow.attach(llava, FASTV):
        conversation = Conversation(llava, len(first["input_ids"]))
        with torch.no_grad():
            conversation.ask(first)
        llava.train()
        with pytest.raises(UnsupportedCall, match="no gradients flow through parked tokens"):
            conversation.ask(turns(1)[0])
        llava.eval()
        with torch.no_grad():
            llava(**first)


def test_pad_is_no_word() -> None:
    assert PAD not in {token for row in TURNS for token in row}


@torch.no_grad()
def test_a_conversation_that_begins_with_a_prefix_recalls_the_same(llava: Any) -> None:
    first, second = prompt(((3, "I", 5),)), turns(1)[0]["input_ids"]
    found = []
    with dropflow.attach(llava, POLICIES["hidrop"]) as flow:
        prefix = flow.prefix(**first)
        for given in (first | {CACHE_ARGUMENT: DynamicCache(config=llava.config)}, prefix.inputs(**first)):
            llava(**given)
            found.append(llava(input_ids=second, **{CACHE_ARGUMENT: given[CACHE_ARGUMENT]}).logits)
    assert relative_error(found[1], found[0]) < 1e-5


@torch.no_grad()
def test_a_later_turn_is_no_part_of_the_prompt_that_is_reported(llava: Any) -> None:
    """Its work and its choice are others, so that keeps replayed over it would be wrong."""
    with dropflow.attach(llava, FASTV) as flow:
        conversation = Conversation(llava, 1)
        conversation.ask(prompt(((3, "I", 5),)))
        live, keeps, flops = flow.live(), flow.keeps(), flow.report().flops
        conversation.ask(turns(1)[0])
        assert torch.equal(flow.live(), live)
        assert (flow.keeps(), flow.report().flops) == (keeps, flops)
        held = sum(2 * layer.keys.numel() * 4 for layer in conversation.cache.layers)
        assert flow.report().kv_bytes_end == held
        with flow.replay(keeps), pytest.raises(UnsupportedCall, match="replay: keeps are those of one prompt"):
            conversation.ask(turns(1)[1])


@torch.no_grad()
def test_a_turn_of_another_number_of_samples_is_refused(llava: Any) -> None:
    with dropflow.attach(llava, FASTV):
        conversation = Conversation(llava, 1)
        conversation.ask(prompt(((3, "I", 5),)))
        ids = torch.cat((conversation.ids, torch.tensor([[11, 12, 13]])), 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE_ARGUMENT: conversation.cache}
        with pytest.raises(UnsupportedCall, match="holds 1 samples, and the call has 3, as with beams"):
            llava.generate(**given, num_beams=3, do_sample=False, max_new_tokens=2)
        conversation.cache.batch_repeat_interleave(3)
        beams = llava.generate(**given, num_beams=3, do_sample=False, max_new_tokens=2)
        assert beams.shape == (1, ids.shape[1] + 2)


def test_what_is_parked_holds_no_gradients_and_shares_what_layers_share(llava: Any) -> None:
    cache = DynamicCache(config=llava.config)
    with dropflow.attach(llava, FASTV):
        llava(**prompt(((3, "I", 5),)), **{CACHE_ARGUMENT: cache})
        parked = parked_in(cache)
        assert parked is not None
        once = parked.nbytes
        assert not any(one.requires_grad for one in (parked.hidden, parked.embeds, *parked.queries.values()))
        with torch.no_grad():
            llava(**prompt(((3, "I", 5),)), **{CACHE_ARGUMENT: cache})
        assert dropflow.parked_bytes(cache) == 2 * once


@torch.no_grad()
def test_a_sample_recalls_the_same_whatever_its_neighbours_bring(llava: Any) -> None:
    """In a call that brings images nothing is recalled, so no sample of it may have tokens to recall and no image."""
    first = prompt((("I", 5), (3,), ("I", 4)))
    with dropflow.attach(llava, FASTV):
        conversation = Conversation(llava, 3)
        conversation.ask(first)
        with pytest.raises(UnsupportedCall, match="recall: in this call some samples bring images"):
            conversation.ask(prompt((("I", 3), ("I", 3), (19,)), seed=5))
        together = Conversation(llava, 3)
        together.ask(first)
        # the second sample had none before, the others bring new ones
        more = prompt((("I", 3), (19,), ("I", 3)), seed=5)
        asked = [together.ask(more)[0], together.ask(turns(3)[0])[0]]
        alone = Conversation(llava, 1)
        for number, call in enumerate((first, more)):
            pixels = call["pixel_values"][-1:]  # of the last sample
            own = call["attention_mask"][2].bool()
            found, _ = alone.ask({"input_ids": call["input_ids"][2:, own], "pixel_values": pixels})
            if number:
                assert relative_error(found[0, -3:], asked[0][2, -3:]) < 1e-5
        found, _ = alone.ask({"input_ids": turns(3)[0]["input_ids"][2:]})
        assert relative_error(found[0], asked[1][2]) < 1e-5

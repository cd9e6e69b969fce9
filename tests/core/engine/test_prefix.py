"""A question that begins with a prefix is answered as if all of it had been asked anew, and costs only the rest."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from prefixed import BUDGET, POLICIES, TAILS, after_prefix, asked, shown
from tiny import HIDROP, IMAGE, PAD, policy, prompt, relative_error, tiny_llava
from transformers import DynamicCache, StaticCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import UnsupportedCall


@pytest.mark.parametrize("positions", ["persistent", "compact"])
@pytest.mark.parametrize("which", POLICIES)
@torch.no_grad()
def test_questions_are_answered_as_if_asked_anew(llava: Any, which: str, positions: str) -> None:
    with dropflow.attach(llava, {**POLICIES[which], "positions": positions}) as flow:
        prefix = flow.prefix(**shown())
        for side in ("left", "right"):
            inputs = asked(side=side)
            anew, live, kept = llava(**inputs).logits, flow.live(), flow.report().kv_bytes
            again = llava(**prefix.inputs(**inputs)).logits
            tokens = after_prefix(inputs)
            assert relative_error(again[tokens], anew[tokens]) < 1e-5
            assert torch.equal(flow.live(), live)
            assert flow.report().kv_bytes == kept


GREEDY, BEAMS, SAMPLING = {"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}


@pytest.mark.parametrize(
    ("mode", "attention"),
    [
        (GREEDY, "sdpa"),
        (GREEDY, "eager"),
        (BEAMS, "sdpa"),
        (SAMPLING, "sdpa"),
        pytest.param(BEAMS, "eager", marks=pytest.mark.slow),
        pytest.param(SAMPLING, "eager", marks=pytest.mark.slow),
    ],
    ids=["greedy", "greedy, eager", "beams", "sampling", "beams, eager", "sampling, eager"],
)
@pytest.mark.parametrize("which", ["hidrop", "mustdrop", "encode", "fastv"])
def test_generated_tokens_are_those_of_the_whole_prompt(which: str, mode: dict[str, Any], attention: str) -> None:
    model, inputs = tiny_llava(attention=attention), asked()
    with dropflow.attach(model, POLICIES[which]) as flow:
        prefix = flow.prefix(**shown())
        found = []
        for given in (inputs, prefix.inputs(**inputs)):
            torch.manual_seed(0)
            found.append(model.generate(**given, **mode, **BUDGET))
    assert torch.equal(*found)


@pytest.mark.parametrize("which", POLICIES)
@torch.no_grad()
def test_under_the_contract_of_flash_attention(which: str) -> None:
    from flash_stand_in import registered

    with registered() as name:
        model = tiny_llava()
        model.get_decoder().config._attn_implementation = name
        with dropflow.attach(model, POLICIES[which]) as flow:
            prefix = flow.prefix(**shown())
            for side in ("left", "right"):
                inputs = asked(side=side)
                anew, tokens = model(**inputs).logits, after_prefix(inputs)
                assert relative_error(model(**prefix.inputs(**inputs)).logits[tokens], anew[tokens]) < 1e-5


@torch.no_grad()
def test_the_text_after_the_prefix_alone(llava: Any) -> None:
    inputs = asked()
    with dropflow.attach(llava, HIDROP) as flow:
        prefix = flow.prefix(**shown())
        most = max(map(len, TAILS))
        tails = {
            "input_ids": torch.tensor([[PAD] * (most - len(tail)) + list(tail) for tail in TAILS]),
            "attention_mask": torch.tensor([[0] * (most - len(tail)) + [1] * len(tail) for tail in TAILS]),
        }
        made = prefix.inputs_after(**tails)
        assert torch.equal(made["input_ids"], inputs["input_ids"])
        assert torch.equal(made["attention_mask"], inputs["attention_mask"])
        whole = llava.generate(**prefix.inputs(**inputs), do_sample=False, **BUDGET)
        assert torch.equal(llava.generate(**made, do_sample=False, **BUDGET), whole)


@torch.no_grad()
def test_vision_and_the_first_layers_run_once(llava: Any) -> None:
    seen: list[int] = []
    first, later = (llava.model.language_model.layers[number] for number in (1, 2))
    handles = [
        llava.model.vision_tower.register_forward_pre_hook(lambda *_: seen.append(-1)),
        first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])),
        later.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])),
    ]
    with dropflow.attach(llava, HIDROP) as flow:
        prefix = flow.prefix(**shown())
        assert (prefix.tokens, prefix.visual_tokens, prefix.boundary) == (20, 16, 2)
        assert seen == [-1, 20]  # without the text after it, and the forward ends at boundary 2
        seen.clear()
        llava(**prefix.inputs(**asked()))
        assert seen == [7, 7 + 4 + 7]  # the longest question, and with 4 words and 7 of 16 visual tokens
        again = flow.report()
        llava(**asked())
    for handle in handles:
        handle.remove()
    # layers 0 and 1: the questions' tokens alone, attending to all that is live
    width, of = llava.config.text_config, [4, 1, 7]
    head, kv = width.hidden_size // 4, width.hidden_size // 4 * 2
    for layer, ahead in ((0, 4), (1, 20)):
        work = [
            n * (width.hidden_size * (4 * head * 2 + 2 * kv) + 3 * width.hidden_size * width.intermediate_size)
            + 2 * n * (n + ahead) * 4 * head
            for n in of
        ]
        assert again.layers[layer].flops == pytest.approx(sum(work) / 3)


@torch.no_grad()
def test_questions_cannot_change_the_prefix(llava: Any) -> None:
    with dropflow.attach(llava, POLICIES["fastv"]) as flow:
        prefix = flow.prefix(**shown())
        before = [part.clone() for keys, values, _ in prefix._ahead.entries.values() for part in (keys, values)]
        first, second = prefix.inputs(**asked()), prefix.inputs(**asked([(40, 41)]))
        answers = [llava.generate(**given, do_sample=False, **BUDGET) for given in (first, second)]
        once_more = [
            llava.generate(**prefix.inputs(**given), do_sample=False, **BUDGET)
            for given in (asked(), asked([(40, 41)]))
        ]
        after = [part for keys, values, _ in prefix._ahead.entries.values() for part in (keys, values)]
    for answer, again in zip(answers, once_more, strict=True):
        assert torch.equal(answer, again)
    assert all(torch.equal(*both) for both in zip(before, after, strict=True))


@pytest.mark.parametrize("more", [{"input_ids": torch.tensor([[21, 22, 23]])}, prompt([(2, "I", 8)])])
@torch.no_grad()
def test_a_conversation_goes_on_from_it(llava: Any, more: dict[str, Any]) -> None:
    """Also with other images, in a turn that is longer than the prefix."""
    inputs, second = asked([TAILS[0]]), []
    with dropflow.attach(llava, HIDROP) as flow:
        prefix = flow.prefix(**shown())
        for given in (inputs | {CACHE_ARGUMENT: DynamicCache(config=llava.config)}, prefix.inputs(**inputs)):
            llava(**given)
            own = more | {"attention_mask": None, CACHE_ARGUMENT: given[CACHE_ARGUMENT]}
            second.append(llava(**own).logits)
    assert relative_error(second[1], second[0]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["persistent", "compact"])
@torch.no_grad()
def test_later_calls_of_a_padded_batch_count_positions_as_the_first_one_did(
    llava: Any, positions: str, side: str
) -> None:
    """A decoder that is given no positions counts padding, which the prefix has none of."""
    inputs, text = asked(side=side), llava.config.get_text_config()
    inputs["attention_mask"][2, -2 if side == "left" else 25] = 0  # which the decoder counts, too
    with dropflow.attach(llava, {**POLICIES["fastv"], "positions": positions}) as flow:
        prefix = flow.prefix(**shown())
        found = [
            _later_logits(llava, given, stated=stated)
            for given in (
                inputs | {CACHE_ARGUMENT: DynamicCache(config=text)},
                prefix.inputs(**inputs),
                prefix.inputs(**inputs, **{CACHE_ARGUMENT: StaticCache(config=text, max_cache_len=64)}),
            )
            for stated in (False, True)
        ]
    for other in found[1:]:
        assert relative_error(other, found[0]) < 1e-5


def _later_logits(model: Any, given: dict[str, Any], *, stated: bool) -> torch.Tensor:
    """Logits of a step, a turn and a step on a copy of the cache, before each of which samples change places."""
    cache, mask, logits = deepcopy(given[CACHE_ARGUMENT]), given["attention_mask"], []
    model(**given | {CACHE_ARGUMENT: cache})
    for ids in (torch.tensor([[5], [6], [7]]), torch.tensor([[8, 9], [10, 11], [12, 13]]), torch.tensor([[14]] * 3)):
        order, start = torch.tensor([2, 0, 1]), mask.shape[1]
        cache.reorder_cache(order)
        cache, mask = deepcopy(cache), torch.nn.functional.pad(mask[order], (0, ids.shape[1]), value=1)
        own = {"position_ids": torch.arange(start, mask.shape[1])[None]} if stated else {}
        logits.append(model(input_ids=ids, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **own).logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def test_memory_is_told_and_freed(llava: Any) -> None:
    with dropflow.attach(llava, POLICIES["fastv"]) as flow:
        prefix = flow.prefix(**shown())
        width, head = llava.config.text_config.hidden_size, llava.config.text_config.hidden_size // 4
        entries, embeds, states, query = 2 * 2 * 2 * 20 * head, 20 * width, 20 * width, 20 * width
        assert prefix.nbytes == 4 * (entries + embeds + states + query)
        watched = weakref.ref(prefix._ahead.entries[0][0])
        llava(**prefix.inputs(**asked()))
        del prefix
        gc.collect()
        assert watched() is None


@torch.no_grad()
def test_a_store_lets_the_least_recent_go(llava: Any) -> None:
    with dropflow.attach(llava, POLICIES["fastv"]) as flow:
        made: list[str] = []

        def get(key: str) -> dropflow.Prefix:
            return store.get(key, lambda: made.append(key) or flow.prefix(**shown()))  # type: ignore[func-returns-value]

        one = flow.prefix(**shown()).nbytes
        store = dropflow.Prefixes(2 * one)
        for key in ("a", "b", "a", "c", "a", "b"):
            get(key)
        assert made == ["a", "b", "c", "b"]
        assert (len(store), store.nbytes) == (2, 2 * one)
        held = get("a")
        store.clear()
        assert (len(store), store.nbytes) == (0, 0)
        small = dropflow.Prefixes(one - 1)
        small.get("a", lambda: held)
        assert len(small) == 0
    with pytest.raises(ValueError, match="expected a positive number of bytes"):
        dropflow.Prefixes(0)


@torch.no_grad()
def test_a_store_makes_it_again_under_another_policy(llava: Any) -> None:
    store = dropflow.Prefixes(10**9)
    for keep in (6, 3):
        with dropflow.attach(llava, policy(rank={"use": "fastv/attention-rank", "at": 2, "keep": keep})) as flow:
            prefix = store.get("a", lambda flow=flow: flow.prefix(**shown()))  # type: ignore[misc]
            llava(**prefix.inputs(**asked()))
            assert flow.report().layers[2].visual_tokens == keep


def _calls(llava: Any, flow: dropflow.Flow) -> dict[str, tuple[Any, str]]:
    prefix, inputs = flow.prefix(**shown()), asked()
    other = inputs | {
        "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == int(shown()["input_ids"][0, 1]), 77)
    }
    bare = {name: value for name, value in inputs.items() if name != "pixel_values"}
    ends = {name: value[:, :20] for name, value in bare.items() if name != "pixel_values"}
    more = asked([(*TAILS[0], *[IMAGE] * 16)])
    embeds = {"inputs_embeds": torch.zeros(3, 27, 32), "attention_mask": inputs["attention_mask"]}
    return {
        "other tokens": (lambda: llava(**prefix.inputs(**other)), r"input_ids\[0\]: does not begin with the 20 tokens"),
        "nothing after": (lambda: prefix.inputs(input_ids=shown()["input_ids"][:, :20]), r"ends with the 20 tokens"),
        "cut": (lambda: prefix.inputs(**ends), "does not begin with|ends with"),
        "pixels": (
            lambda: llava(**prefix.inputs(**inputs), pixel_values=inputs["pixel_values"]),
            "pixel_values: the prefix",
        ),
        "more images": (lambda: llava(**prefix.inputs(**more)), "have image placeholders after the prefix"),
        "embeddings": (
            lambda: llava(**{**embeds, CACHE_ARGUMENT: prefix.inputs(**inputs)[CACHE_ARGUMENT]}),
            "must state `input_ids`",
        ),
        "the decoder": (
            lambda: llava.model.language_model(
                input_ids=inputs["input_ids"], **{CACHE_ARGUMENT: prefix.inputs(**inputs)[CACHE_ARGUMENT]}
            ),
            "was called directly",
        ),
        "positions": (
            lambda: llava(**prefix.inputs(**inputs), position_ids=torch.arange(27).expand(3, -1) + 1),
            "position_ids: the tokens of the prefix have others",
        ),
        "a batch": (lambda: flow.prefix(**inputs), "of one prompt; make a prefix of each"),
        "padding": (
            lambda: flow.prefix(**{name: value[1:2] for name, value in inputs.items()}),
            "the prompt has padding",
        ),
        "no image": (lambda: flow.prefix(input_ids=torch.tensor([[1, 5, 6]])), "brings no image"),
        "too short": (lambda: flow.prefix(tokens=19, **shown()), "expected a number of tokens from 20, up to which"),
        "too long": (lambda: flow.prefix(tokens=26, **shown()), "to 25, its length; got 26"),
        "a cache": (lambda: flow.prefix(**shown(), use_cache=True), "use_cache: not for a prefix"),
    }


NAMES = (
    *("other tokens", "nothing after", "cut", "pixels", "more images", "embeddings", "the decoder", "positions"),
    *("a batch", "padding", "no image", "too short", "too long", "a cache"),
)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_cannot_be_right_is_refused_before_a_layer_runs(llava: Any, name: str) -> None:
    ran: list[int] = []
    with dropflow.attach(llava, HIDROP) as flow:
        before, calls = llava(**asked()).logits, _calls(llava, flow)
        assert tuple(calls) == NAMES
        call, message = calls[name]
        handle = llava.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(UnsupportedCall, match=message):
            call()
        handle.remove()
        assert not ran
        assert torch.equal(llava(**asked()).logits, before)


def test_no_gradients_flow_through_a_prefix(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP) as flow:
        prefix = flow.prefix(**shown())
        llava.train()
        with pytest.raises(UnsupportedCall, match="through which no gradients flow"):
            llava(**prefix.inputs(**asked()))


@torch.no_grad()
def test_it_survives_neither_detach_nor_another_policy(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP) as flow:
        prefix = flow.prefix(**shown())
        ready = prefix.inputs(**asked())
    with pytest.raises(UnsupportedCall, match="its policy 'test' is no longer attached"):
        prefix.inputs(**asked())
    with pytest.raises(UnsupportedCall, match="written under a policy"):
        llava(**ready)
    with dropflow.attach(llava, POLICIES["fastv"]), pytest.raises(UnsupportedCall, match="under another policy"):
        llava(**ready)
    with pytest.raises(UnsupportedCall, match="its policy 'test' is no longer attached"):
        flow.prefix(**shown())


@torch.no_grad()
def test_the_policies_of_a_set_have_prefixes_of_their_own(llava: Any) -> None:
    chosen = {"fast": POLICIES["fastv"], "hidrop": HIDROP}
    with dropflow.attach_set(llava, chosen, default="fast") as flows:
        for name in chosen:
            flow = flows[name]
            assert flow is not None
            prefix = flow.prefix(**shown())
            with flows.using(name):
                anew = llava(**asked()).logits
                again = llava(**prefix.inputs(**asked())).logits
            tokens = after_prefix(asked())
            assert relative_error(again[tokens], anew[tokens]) < 1e-5
            other = next(one for one in chosen if one != name)
            with flows.using(other), pytest.raises(UnsupportedCall, match="under another policy"):
                llava(**prefix.inputs(**asked()))

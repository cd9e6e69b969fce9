"""Prefixes on families whose masks, states and caches differ from those of LLaVA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hybrids import exact_delta_net, llava_nemotron_h
from prefixed import BUDGET, POLICIES
from tiny import CHUNKS_IMAGES, HIDROP, policy, relative_error
from transformers import DynamicCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.states import tensors_of
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.testing.asking_again import check_asking_again
from dropflow.testing.case import BrokenGuarantee, Case
from dropflow.testing.families import tiny_models

KINDS = {
    "hidrop": HIDROP,
    "encode": POLICIES["encode"],
    "fastv": policy(rank={"use": "fastv/attention-rank", "at": 3, "keep": 0.4}),
    "pyramiddrop": POLICIES["pyramiddrop"],
    "mustdrop": policy(
        filter={"use": "mustdrop/dual-attention", "at": [2, 4], "global_threshold": 0.04, "individual_threshold": 0.05},
        cache={"use": "mustdrop/output-aware-cache", "at": 2},
    ),
    "window": policy(
        inject={"use": "hidrop/late-injection", "at": 1},
        exit={"use": "hidrop/early-exit", "at": 5},
    ),
}
"""Policies that every family can run, by what they resemble."""
BIDIRECTIONAL = ("gemma3", "molmo2")
"""Families in which tokens of images see later ones."""
HYBRID = ("qwen3_5", "lfm2_vl", "minicpmv4_6")
"""Families with recurrent or convolution layers, the first two before any attention."""
STATES = 3e-5
"""Relative error allowed after recurrent layers; found on some processors: 1.2e-5."""
SHARING = ("gemma3n", "gemma4")
"""Families whose layers from 5 on share the keys of layers 2 and 4."""
BEYOND = {
    "at the sharers": policy(rank={"use": "fastv/attention-rank", "at": 6, "keep": 0.4}),
    "among the sharers": policy(pyramid={"use": "pyramiddrop/pyramid", "keep": {3: 7, 6: 3}}),
    "after a window": policy(
        few={"use": "divprune/max-min", "keep": 5},
        inject={"use": "hidrop/late-injection", "at": 2},
        exit={"use": "hidrop/early-exit", "at": 6},
    ),
    "window and rank": policy(
        rank={"use": "fastv/attention-rank", "at": 6, "keep": 0.4}, exit={"use": "hidrop/early-exit", "at": 7}
    ),
}
"""Policies whose first boundary that depends on the question lies within or after the layers that share keys."""
TAILS = ((5, 6, 7, 8), (9,), (10, 11, 12, 13, 14, 15, 16))


def conversed(family: str, which: str, **options: Any) -> Case:
    adapter, tiny = tiny_models()[family]
    return Case(family, adapter, tiny, {**KINDS, **BEYOND}[which], **options)


def questions(case: Case, prefix: dropflow.Prefix, tails: Any = TAILS) -> dict[str, Any]:
    """Whole prompts that begin with the first sample of a case."""
    row, pictures = case.single(0)["input_ids"][0].tolist(), case.drawn[1][0]
    return case.tiny.collate([[*row[: prefix.tokens], *tail] for tail in tails], [pictures] * len(tails), "left")


@pytest.mark.parametrize("family", [name for name in tiny_models() if name != "paligemma"])
@pytest.mark.parametrize("which", ["window", "fastv"])
def test_every_family_but_one(family: str, which: str) -> None:
    if family == "video_llava" and not CHUNKS_IMAGES:
        pytest.skip("in transformers 5.20, its core hands pixels on to the text decoder, and policies are refused")
    case = conversed(family, which)
    assert 0 < check_asking_again(case) < case.tiny.tolerance


def test_the_kit_tells_where_prefixes_are_refused_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise UnsupportedModel("prefix: no")

    monkeypatch.setattr(dropflow.Flow, "prefix", refused)
    assert check_asking_again(conversed("paligemma", "fastv")) == 0
    with pytest.raises(BrokenGuarantee, match="no question can begin with a prefix: prefix: no"):
        check_asking_again(conversed("gemma3", "fastv"))


EAGER = [
    pytest.param(which, "eager", marks=[pytest.mark.slow] * (which not in ("mustdrop", "window"))) for which in KINDS
]
"""With eager attention, at all times, one policy that ranks and evicts, and one that does neither."""


@pytest.mark.parametrize(("which", "attention"), [*((which, "sdpa") for which in KINDS), *EAGER])
@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_families_whose_images_see_all_of_themselves(family: str, which: str, attention: str) -> None:
    assert 0 < check_asking_again(conversed(family, which, attention=attention)) < 1e-5


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("family", HYBRID)
def test_families_with_states(family: str, which: str) -> None:
    """Questions of different lengths in one batch go on from the states after the prefix."""
    with exact_delta_net():
        assert 0 < check_asking_again(conversed(family, which)) < STATES


@pytest.mark.parametrize("which", [*KINDS, *BEYOND])
@pytest.mark.parametrize("family", SHARING)
def test_families_whose_layers_share_keys(family: str, which: str) -> None:
    case = conversed(family, which)
    assert 0 < check_asking_again(case) < case.tiny.tolerance


@pytest.mark.parametrize("family", SHARING)
def test_stages_that_rotate_what_they_read(family: str) -> None:
    """Gemma 3n hands cos and sin to its layers by position."""
    adapter, tiny = tiny_models()[family]
    case = Case(family, adapter, tiny, policy(corrected={"use": "sparsevlm/gravity-corrected", "keep": {3: 0.5}}))
    assert 0 < check_asking_again(case) < tiny.tolerance


@pytest.mark.parametrize("which", [*KINDS, *BEYOND])
@pytest.mark.parametrize("family", SHARING)
@torch.no_grad()
def test_steps_see_of_shared_keys_what_they_see_after_a_whole_prompt(family: str, which: str) -> None:
    case = conversed(family, which).padded_left()
    options: dict[str, Any] = {**BUDGET, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with case.attach() as flow:
        prefix = flow.prefix(**case.single(0))
        inputs = questions(case, prefix)
        anew, told = case.model.generate(**inputs, **options), flow.report()
        again = case.model.generate(**prefix.inputs(**inputs), **options)
        found = flow.report()
        assert torch.equal(again.sequences, anew.sequences)
        assert relative_error(torch.stack(again.logits), torch.stack(anew.logits)) < case.tiny.tolerance
        assert found.kv_bytes == told.kv_bytes
        assert [one.visual_tokens for one in found.layers] == [one.visual_tokens for one in told.layers]
        assert sum(one.flops for one in found.layers) < sum(one.flops for one in told.layers)


@pytest.mark.parametrize("which", ["hidrop", "encode", "fastv"])
def test_mamba_and_layers_without_a_mixer(which: str) -> None:
    tiny = llava_nemotron_h()
    assert 0 < check_asking_again(Case("nemotron_h", tiny_models()["llava"][0], tiny, KINDS[which])) < 1e-5


@torch.no_grad()
def test_layers_with_states_run_on_the_question_alone() -> None:
    case, seen = conversed("qwen3_5", "fastv").padded_left(), list[tuple[int, ...]]()
    with case.attach() as flow:
        prefix = flow.prefix(**case.single(0))
        alike, ragged = questions(case, prefix, [(5, 6, 7), (8, 9, 10)]), questions(case, prefix)
        anew = case.model(**ragged).logits[:, -1]
        layer = case.adapter(case.model).text.layers[0]
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
        case.model(**prefix.inputs(**alike))
        assert seen == [(2, 3)]
        seen.clear()
        again = case.model(**prefix.inputs(**ragged)).logits[:, -1]
        assert seen == [(3, 1), (3, 4), (3, 7)]  # once for each length
        handle.remove()
        assert relative_error(again, anew) < case.tiny.tolerance
        states = [state.clone() for one in prefix._ahead.recurrent.values() for state in tensors_of(one)]
        case.model.generate(**prefix.inputs(**ragged), do_sample=False, **BUDGET)
        after = [state for one in prefix._ahead.recurrent.values() for state in tensors_of(one)]
        assert all(torch.equal(*both) for both in zip(states, after, strict=True))
        entries = [part for keys, values, _ in prefix._ahead.entries.values() for part in (keys, values)]
        ahead = prefix._ahead
        kept = [*states, *entries, ahead.embeds, ahead.hidden, *ahead.queries.values(), *ahead.states.values()]
        assert prefix.nbytes == sum(one.numel() * one.element_size() for one in kept if one is not None)


@pytest.mark.parametrize("which", ["hidrop", "fastv", "encode"])
@pytest.mark.parametrize("family", [*BIDIRECTIONAL, *HYBRID])
@torch.no_grad()
def test_they_generate_the_same_tokens(family: str, which: str) -> None:
    case, bound = conversed(family, which).padded_left(), STATES if family in HYBRID else 1e-5
    options: dict[str, Any] = {**BUDGET, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with exact_delta_net(), case.attach() as flow:
        prefix = flow.prefix(**case.single(0))
        inputs = questions(case, prefix)
        anew = case.model.generate(**inputs, **options)
        bytes_held = flow.report().kv_bytes
        told = [one.visual_tokens for one in flow.report().layers]
        before = [part.clone() for keys, values, _ in prefix._ahead.entries.values() for part in (keys, values)]
        ways: list[dict[str, Any]] = [{}, {}, {"cache_implementation": "static", "disable_compile": True}]
        if family == "molmo2" and not CHUNKS_IMAGES:
            ways.pop()  # in transformers 5.20, masks that `generate` makes for static caches ignore kinds of tokens
        for more in ways:
            again = case.model.generate(**prefix.inputs(**inputs), **options, **more)
            assert torch.equal(again.sequences, anew.sequences)
            assert relative_error(torch.stack(again.logits), torch.stack(anew.logits)) < bound
            assert flow.report().kv_bytes == bytes_held
        assert [one.visual_tokens for one in flow.report().layers] == told
        after = [part for keys, values, _ in prefix._ahead.entries.values() for part in (keys, values)]
        assert all(torch.equal(*both) for both in zip(before, after, strict=True))
        tails = {"input_ids": torch.tensor([TAILS[0]])}
        alone = case.model.generate(**prefix.inputs_after(**tails), **options)
        assert torch.equal(alone.sequences[0, -6:], anew.sequences[0, -6:])


@torch.no_grad()
def test_what_ends_an_image_and_sees_with_it_belongs_to_the_prefix() -> None:
    """Molmo 2's processor counts the tokens around patches among those that see each other."""
    case = conversed("molmo2", "fastv").padded_left()
    whole = case.single(0)
    places = whole["mm_token_type_ids"][0].nonzero()[:, 0]
    last = int(places[-1])

    def typed(inputs: dict[str, Any]) -> dict[str, Any]:
        kinds = inputs["mm_token_type_ids"]
        return inputs | {"mm_token_type_ids": kinds | torch.nn.functional.pad(kinds, (1, 0))[:, :-1]}

    with case.attach() as flow:
        prefix = flow.prefix(**typed(whole))
        assert prefix.tokens == last + 2
        inputs = typed(questions(case, prefix))
        anew = case.model(**inputs).logits[:, -1]
        assert relative_error(case.model(**prefix.inputs(**inputs)).logits[:, -1], anew) < 1e-5
        with pytest.raises(UnsupportedCall, match=rf"pass at least `tokens={last + 2}`"):
            flow.prefix(tokens=last + 1, **typed(whole))
        per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
        cut = typed(whole) | {name: typed(whole)[name][:, : last + 1] for name in per_token}
        short = flow.prefix(**cut)
        with pytest.raises(UnsupportedCall, match="tokens of the prefix see others here than where it was made"):
            case.model(**short.inputs(**inputs))


@pytest.mark.parametrize("family", BIDIRECTIONAL)
@torch.no_grad()
def test_kinds_of_tokens_decide_what_they_see(family: str) -> None:
    case = conversed(family, "fastv").padded_left()
    name = {"gemma3": "token_type_ids", "molmo2": "mm_token_type_ids"}[family]
    with case.attach() as flow:
        prefix = flow.prefix(**case.single(0))
        inputs = questions(case, prefix)
        without = {key: value for key, value in inputs.items() if key != name}
        with pytest.raises(UnsupportedCall, match=f"{name}: not those of the prompt that the prefix was made from"):
            prefix.inputs(**without)
        with pytest.raises(UnsupportedCall, match=f"{name}: not those of the prompt that the prefix was made from"):
            prefix.inputs(**inputs | {name: torch.zeros_like(inputs[name])})
        ran: list[int] = []
        handle = case.adapter(case.model).text.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        given = prefix.inputs(**inputs)
        del given[name]
        with pytest.raises(UnsupportedCall, match="tokens of the prefix see others here than where it was made"):
            case.model(**given)
        handle.remove()
        assert not ran


def test_models_whose_images_see_the_question_are_refused() -> None:
    case = conversed("paligemma", "fastv")
    ran: list[int] = []
    handle = case.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with case.attach() as flow, pytest.raises(UnsupportedModel, match="see the whole prompt, its question included"):
        flow.prefix(**case.single(0))
    handle.remove()
    assert not ran


def test_what_an_adapter_does_not_say_is_refused() -> None:
    case = conversed("gemma3", "fastv")

    class Silent(case.adapter):  # type: ignore[name-defined,misc]  # the adapter under test
        bidirectional = None

    with (
        dropflow.attach(case.model, case.policy, adapter=Silent) as flow,
        pytest.raises(UnsupportedModel, match="its adapter Silent does not say that these belong to images"),
    ):
        flow.prefix(**case.single(0))


@torch.no_grad()
def test_a_conversation_goes_on_over_sliding_windows() -> None:
    """Sliding layers hold the prefix's entries, of which the model's masks show later tokens those in their window."""
    case, more = conversed("gemma3", "fastv").padded_left(), torch.tensor([[21, 22, 23]])
    with case.attach() as flow:
        prefix, second = flow.prefix(**case.single(0)), []
        inputs = questions(case, prefix, [TAILS[0]])
        cache = DynamicCache(config=case.model.config.get_text_config())
        for given in (inputs | {CACHE_ARGUMENT: cache}, prefix.inputs(**inputs)):
            case.model(**given)
            second.append(case.model(input_ids=more, **{CACHE_ARGUMENT: given[CACHE_ARGUMENT]}).logits)
    assert relative_error(second[1], second[0]) < 1e-5

"""How callers use and misuse prefixes: other families, masks, arguments, memory and host synchronisations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prefixed import BUDGET, POLICIES, TAILS, after_prefix, asked, shown
from syncs import HostSyncs
from tiny import HIDROP, PAD, policy, prompt

import dropflow
from dropflow.errors import UnsupportedCall
from dropflow.testing.families import tiny_models

FASTV = policy(rank={"use": "fastv/attention-rank", "at": 3, "keep": 0.4})


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "glm46v", "llava_onevision"])
@torch.no_grad()
def test_generate_on_families_that_state_positions_in_several_dimensions(family: str) -> None:
    """`generate` passes four planes of positions where a forward alone has three."""
    adapter, tiny = tiny_models()[family]
    model = tiny.model("sdpa")
    own, pictures = tiny.prompt([(3, "I", 2, "I", 5)])
    with dropflow.attach(model, FASTV, adapter=adapter) as flow:
        prefix = flow.prefix(**own)
        start = own["input_ids"][0, : prefix.tokens].tolist()
        inputs = tiny.collate([[*start, *tail] for tail in TAILS], pictures * len(TAILS), "left")
        anew = model.generate(**inputs, do_sample=False, **BUDGET)
        assert torch.equal(model.generate(**prefix.inputs(**inputs), do_sample=False, **BUDGET), anew)
        most = max(map(len, TAILS))
        rest = {
            "input_ids": torch.tensor([[PAD] * (most - len(tail)) + list(tail) for tail in TAILS]),
            "attention_mask": torch.tensor([[0] * (most - len(tail)) + [1] * len(tail) for tail in TAILS]),
        }
        assert torch.equal(model.generate(**prefix.inputs_after(**rest), do_sample=False, **BUDGET), anew)


def _wrong(llava: Any, flow: dropflow.Flow, prefix: dropflow.Prefix) -> dict[str, tuple[Any, str]]:
    own, inputs = shown(), asked()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tail = torch.tensor([[5, 6]])
    holes = mask.clone()
    holes[0, 15] = 0
    return {
        "a number as text": (lambda: flow.prefix(tokens="20", **own), "expected `tokens` as a whole number, got '20'"),
        "a share": (lambda: flow.prefix(tokens=20.5, **own), r"whole number, got 20\.5"),
        "a truth": (lambda: flow.prefix(tokens=True, **own), "whole number, got True"),
        "a short mask": (
            lambda: flow.prefix(**own | {"attention_mask": torch.ones(1, 7)}),
            r"expected `attention_mask` \(1, 25\), as `input_ids`, got a tensor \(1, 7\)",
        ),
        "ids of floats": (
            lambda: flow.prefix(**own | {"input_ids": own["input_ids"].float()}),
            r"got a tensor \(1, 25\) of torch\.float32",
        ),
        "own positions": (
            lambda: flow.prefix(position_ids=torch.arange(25)[None], **own),
            "position_ids: not for a prefix",
        ),
        "own outputs": (lambda: flow.prefix(return_dict=True, **own), "return_dict: not for a prefix"),
        "no ids": (prefix.inputs, "of whole prompts, got NoneType"),
        "no samples": (lambda: prefix.inputs(input_ids=ids[:0]), r"got a tensor \(0, 27\)"),
        "no tokens": (lambda: prefix.inputs(input_ids=ids[:, :0]), r"got a tensor \(3, 0\)"),
        "a list": (lambda: prefix.inputs(input_ids=ids.tolist()), "got list"),
        "another mask": (lambda: prefix.inputs(input_ids=ids, attention_mask=mask[:1]), r"\(3, 27\), as `input_ids`"),
        "a hidden token": (
            lambda: prefix.inputs(input_ids=ids, attention_mask=holes),
            r"input_ids\[0\]: does not begin with",
        ),
        "labels": (lambda: prefix.inputs(labels=ids, **inputs), "labels: not among the inputs that the prefix"),
        "options": (lambda: prefix.inputs(max_new_tokens=3, **inputs), "max_new_tokens: not among the inputs"),
        "after: no ids": (prefix.inputs_after, "of what follows the prefix, got NoneType"),
        "after: one row": (lambda: prefix.inputs_after(input_ids=tail[0]), r"got a tensor \(2,\)"),
        "after: labels": (lambda: prefix.inputs_after(input_ids=tail, labels=tail), "labels: not among the inputs"),
        "after: mask": (
            lambda: prefix.inputs_after(input_ids=tail, attention_mask=mask[:1]),
            r"expected `attention_mask` \(1, 2\)",
        ),
        "no cache": (
            lambda: llava.generate(**prefix.inputs(**inputs), use_cache=False, max_new_tokens=2),
            "use_cache: false, but a prefix rides on the cache",
        ),
        "chunks": (
            lambda: llava.generate(**prefix.inputs(**inputs), prefill_chunk_size=8, max_new_tokens=2),
            "in one forward",
        ),
    }


@torch.no_grad()
def test_wrong_inputs_are_refused_before_a_layer_runs(llava: Any) -> None:
    ran: list[int] = []
    with dropflow.attach(llava, HIDROP) as flow:
        prefix, inputs = flow.prefix(**shown()), asked()
        before = llava(**prefix.inputs(**inputs)).logits
        handle = llava.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        for name, (call, message) in _wrong(llava, flow, prefix).items():
            with pytest.raises(UnsupportedCall, match=message):
                call()
            assert not ran, name
        handle.remove()
        assert torch.equal(llava(**prefix.inputs(**inputs)).logits, before)


@torch.no_grad()
def test_inputs_serve_one_call_alone(llava: Any) -> None:
    """Whole prompts on the cache of an earlier answer would be taken for text, placeholders included."""
    with dropflow.attach(llava, HIDROP) as flow:
        prefix = flow.prefix(**shown())
        first, second, third = (prefix.inputs(**asked()) for _ in range(3))
        llava(**first)
        llava.generate(**second, do_sample=False, **BUDGET)
        with pytest.raises(UnsupportedCall, match="cu_seq_lens_q"):
            llava(**third, cu_seq_lens_q=torch.tensor([0, 27]))
        for again in (first, second, third):
            with pytest.raises(UnsupportedCall, match="a call has begun with this cache of a prefix already"):
                llava(**again)
        with pytest.raises(UnsupportedCall, match="a call has begun with this cache of a prefix already"):
            llava.generate(**second, do_sample=False, **BUDGET)


def test_a_prefix_is_made_without_dropout(llava: Any) -> None:
    with dropflow.attach(llava.train(), HIDROP) as flow:
        with pytest.raises(UnsupportedCall, match=r"prefix: the model is in `train\(\)`"):
            flow.prefix(**shown())
        llava.eval()
        assert flow.prefix(**shown()).tokens == 20


@torch.no_grad()
def test_keeps_are_not_replayed_over_a_prefix(llava: Any) -> None:
    with dropflow.attach(llava, POLICIES["fastv"]) as flow:
        prefix, inputs = flow.prefix(**shown()), asked()
        llava(**inputs)
        keeps = flow.keeps()
        llava(**prefix.inputs(**inputs))
        assert flow.keeps() == keeps
        with flow.replay(keeps[::-1]), pytest.raises(UnsupportedCall, match="replay: keeps are replayed over whole"):
            llava(**prefix.inputs(**inputs))


@torch.no_grad()
def test_labels_where_the_prefix_has_states_to_predict_them(llava: Any) -> None:
    inputs = asked()
    labels = inputs["input_ids"].masked_fill(~after_prefix(inputs), -100)
    with dropflow.attach(llava, HIDROP) as flow:
        anew = llava(**inputs, labels=labels).loss
        assert float(llava(**flow.prefix(**shown()).inputs(**inputs), labels=labels).loss) == pytest.approx(float(anew))
    with dropflow.attach(llava, POLICIES["encode"]) as flow:
        prefix = flow.prefix(**shown())
        with pytest.raises(UnsupportedCall, match="labels: the policy decides nothing in the LLM"):
            llava(**prefix.inputs(**inputs), labels=labels)


def _held(value: Any, found: dict[int, int], seen: set[int]) -> dict[int, int]:
    """Bytes of all storages that an object keeps alive, by address."""
    if id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif hasattr(value, "items"):
            _held(list(value.values()), found, seen)
        elif isinstance(value, tuple | list):
            for one in value:
                _held(one, found, seen)
        elif type(value).__module__.startswith("dropflow.engine.tokens"):
            _held(vars(value), found, seen)
    return found


@pytest.mark.parametrize("which", ["hidrop", "encode", "fastv", "values and states"])
@torch.no_grad()
def test_nothing_of_a_long_prompt_stays_alive(llava: Any, which: str) -> None:
    with dropflow.attach(llava, POLICIES[which]) as flow:
        sizes = []
        for words in (5, 300):
            prefix = flow.prefix(**prompt([(3, "I", words)]))
            held = sum(_held([prefix._ahead, prefix._inputs, prefix._kinds], {}, set()).values())
            sizes.append(held)
            assert prefix.nbytes <= held < prefix.nbytes + 100 * prefix.tokens
        assert sizes[1] - sizes[0] < 100


@pytest.mark.parametrize("which", ["hidrop", "encode", "fastv"])
@torch.no_grad()
def test_a_question_reads_no_more_of_the_device_than_a_whole_prompt(llava: Any, which: str) -> None:
    with dropflow.attach(llava, POLICIES[which]) as flow:
        prefix = flow.prefix(**shown())
        inputs, ready = asked(), prefix.inputs(**asked())
        with HostSyncs() as whole:
            llava(**inputs)
        with HostSyncs() as begun:
            llava(**ready)
    own = [place for place in begun.places if "masking_utils" not in place]
    assert len(begun.places) <= len(whole.places), own
    assert len(own) <= {"hidrop": 4, "encode": 2, "fastv": 3}[which], own

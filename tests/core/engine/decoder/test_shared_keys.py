"""Layers that share keys: a pruned run equals the masked one wherever tokens enter and leave, and in every mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from transformers import DynamicCache
from watching import rows_at

import dropflow
from dropflow import Stage
from dropflow.backbone.backbone import Backbone
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.decoder import decide_window
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.errors import DecisionError, PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.lifecycle.cache_payloads import CacheCall, CacheKeep
from dropflow.lifecycle.events import CacheEvent
from dropflow.lifecycle.payloads import WindowCall
from dropflow.testing import AbsentOracle, MaskedOracle, tiny_models
from dropflow.testing.case import relative_error
from dropflow.testing.probes import policy
from dropflow_adapters.gemma4 import Gemma4

FAMILIES = tiny_models()
SHARING = ("gemma3n", "gemma4", "gemma4_unified")
"""Families of eight layers, of which 5 to 7 share the keys of 2 and 4."""
SAMPLES = [(3, "I", 5), (1, "I", 2, "I", 10), (4,)]
BUDGET = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def random(*boundaries: int) -> dict[str, Any]:
    """A stage that keeps fewer and fewer random tokens from these boundaries on."""
    shares = dict(zip(boundaries, (0.7, 0.4, 0.2), strict=False))
    return {"use": "control/random", "keep": shares, "seed": 3}


WHERE: dict[str, dict[str, Any]] = {
    "before both producers": policy(a=random(1)),
    "between them": policy(a=random(3)),
    "after both": policy(a=random(5)),
    "before every sharer": policy(a=random(5, 6, 7)),
    "at both producers and after": policy(a=random(2, 4, 6)),
    "entry at the first producer": policy(i={"use": "hidrop/late-injection", "at": 2}, a=random(3, 5)),
    "entry before it, exit after the last": policy(
        i={"use": "hidrop/late-injection", "at": 1}, a=random(2, 5), e={"use": "hidrop/early-exit", "at": 7}
    ),
    "exit between producers and sharers": policy(a=random(2), e={"use": "hidrop/early-exit", "at": 5}),
    "exit between the producers": policy(e={"use": "hidrop/early-exit", "at": 3}),
    "dropped when encoded": policy(a={"use": "divprune/max-min", "keep": 0.5}),
}


@cache
def model_of(name: str, attention: str = "sdpa") -> Any:
    return FAMILIES[name][1].model(attention)


def prompt(name: str, samples: Any = SAMPLES, **how: Any) -> dict[str, Any]:
    return FAMILIES[name][1].prompt(samples, **how)[0]


@contextmanager
def embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Collects the embeddings that the text decoder receives."""
    seen: list[Tensor] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    yield seen
    handle.remove()


def cells() -> list[Any]:
    """Every family dropping everywhere; at all times one family everywhere, and each of the others at every other."""
    return [
        pytest.param(name, where, marks=[pytest.mark.slow] * (row > 0 and (row + column) % 2))
        for row, name in enumerate(SHARING)
        for column, where in enumerate(WHERE)
    ]


@pytest.mark.parametrize(("name", "where"), cells())
@torch.no_grad()
def test_prefill_and_decoding_equal_the_masked_run(name: str, where: str) -> None:
    model, inputs = model_of(name), prompt(name)
    with dropflow.attach(model, WHERE[where]) as flow, embeddings(model) as embeds:
        logits, live, report = model(**inputs).logits, flow.live(), flow.report()
        tokens = model.generate(**inputs, **BUDGET)
    assert not live.all(), "the policy dropped nothing, so the comparison would prove nothing"
    real = inputs["attention_mask"].bool()
    for oracle in (MaskedOracle, AbsentOracle):
        with oracle(model, live, embeds=embeds[0]):
            expected = model(**inputs, use_cache=False).logits
        assert relative_error(logits[real], expected[real]) < 3e-5
    with MaskedOracle(model, live, embeds=embeds[0]):
        assert torch.equal(tokens, model.generate(**inputs, **BUDGET, use_cache=False))
    assert [layer.kv_entries for layer in report.layers[5:]] == [0, 0, 0], "layers that share keys hold none"


@pytest.mark.parametrize("name", SHARING)
@torch.no_grad()
def test_beams_have_the_scores_of_the_masked_run(name: str) -> None:
    model, inputs = model_of(name), prompt(name)
    how = {**BUDGET, "num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    with dropflow.attach(model, policy(a=random(1, 3, 6))) as flow:
        found = model.generate(**inputs, **how)
        live = flow.live()[:, ::3]
    with MaskedOracle(model, live):
        expected = model.generate(**inputs, **how, use_cache=False)
    assert torch.equal(found.sequences, expected.sequences)
    assert relative_error(found.sequences_scores, expected.sequences_scores) < 1e-5


@pytest.mark.parametrize("name", SHARING)
def test_loss_and_gradients_equal_the_masked_run(name: str) -> None:
    tiny = FAMILIES[name][1]
    model, inputs = tiny.model().train(), prompt(name)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    runs = []
    with dropflow.attach(model, policy(a=random(1, 5, 6))) as flow:
        loss = model(**inputs).loss
        loss.backward()
        live = flow.live()
    runs.append((loss, gradients(model)))
    with MaskedOracle(model, live):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
    runs.append((loss, gradients(model)))
    (got, found), (loss, expected) = runs
    assert relative_error(got[None], loss[None]) < 1e-5
    scales = {weight: float(gradient.abs().max()) for weight, gradient in expected.items()}
    assert max(relative_error(found[w], expected[w]) for w, scale in scales.items() if scale > 1e-6) < 1e-3


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def test_flash_attention_contract() -> None:
    """A kernel with one validity per key, causal from the bottom right, in which a query is a key of the same call."""
    from flash_stand_in import registered

    def wide() -> Any:
        model = FAMILIES["gemma4"][1].model()
        model.get_decoder().config.sliding_window = 512  # which the stand-in does not know
        for layer in model.get_decoder().layers:
            layer.self_attn.sliding_window = None
        return model

    inputs = prompt("gemma4")
    real = inputs["attention_mask"].bool()
    with registered() as name:
        model, reference = wide(), wide()
        model.get_decoder().config._attn_implementation = name
        with dropflow.attach(model, policy(a=random(1, 5, 6))) as flow:
            logits, live = model(**inputs).logits, flow.live()
            tokens = model.generate(**inputs, **BUDGET)
        with MaskedOracle(reference, live):
            assert relative_error(logits[real], reference(**inputs, use_cache=False).logits[real]) < 3e-5
            assert torch.equal(tokens, reference.generate(**inputs, **BUDGET, use_cache=False))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    runs = []
    for checkpoints in (False, True):
        model, inputs = FAMILIES["gemma4"][1].model().train(), prompt("gemma4")
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for layer in model.get_decoder().layers:
            layer.gradient_checkpointing = checkpoints
            layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        with dropflow.attach(model, policy(a=random(1, 5, 6))):
            model(**inputs, use_cache=False).loss.backward()
        runs.append(gradients(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


class EvictsHalf(Stage[Any]):
    """Evicts every second visual entry of layer 2, which layer 6 reads, and of no other."""

    @dropflow.hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep:
        view = next(view for view in call.layers if view.layer == 2)
        return CacheKeep({2: (view.image_id < 0) | (view.index % 2 == 0)})


class Views(Stage[Any]):
    """Records the views of the caches, and decides nothing."""

    @dropflow.hookimpl
    def observe_cache(self, event: CacheEvent) -> None:
        self.layers = [view.layer for view in event.layers]


@pytest.mark.parametrize("name", SHARING)
@torch.no_grad()
def test_eviction_at_a_producer_evicts_for_its_sharers(name: str) -> None:
    model, inputs = model_of(name), prompt(name)
    visual = FAMILIES[name][0](model).placeholders(inputs["input_ids"])
    evicts = policy(a=random(1, 5), evict={"use": EvictsHalf}, views={"use": Views})
    with dropflow.attach(model, evicts) as flow:
        tokens = model.generate(**inputs, **BUDGET)
        live = flow.live()
        assert dict(flow.plan.stages)["views"].layers == [0, 1, 2, 3, 4]
        readers = [2, *(layer for layer, producer in flow.plan.shape.producers if producer == 2)]
    held = torch.ones_like(live)
    for layer in readers:
        held[layer] = ~visual | (torch.arange(live.shape[2]) % 2 == 0)
    assert len(readers) > 1
    with MaskedOracle(model, live, held=held):
        assert torch.equal(tokens, model.generate(**inputs, **BUDGET, use_cache=False))
    held[readers[1:]] = True  # as if only the layer that makes the keys had lost them
    with MaskedOracle(model, live, held=held):
        assert not torch.equal(tokens, model.generate(**inputs, **BUDGET, use_cache=False))


def test_a_layer_that_shares_keys_has_no_entries_to_evict() -> None:
    class EvictsShared(Stage[Any]):
        @dropflow.hookimpl
        def decode_cache(self, call: CacheCall) -> CacheKeep:
            return CacheKeep({6: torch.ones_like(call.layers[0].valid)})

    told = r"stages\.e: .* for layer 6, expected a layer from 0 to 4"
    with dropflow.attach(model_of("gemma4"), policy(e={"use": EvictsShared})), pytest.raises(DecisionError, match=told):
        model_of("gemma4")(**prompt("gemma4"), use_cache=True)


TURNS = [(name, turn) for name in SHARING for turn in ("text", "image") if (name, turn) != ("gemma4_unified", "image")]
"""Without the case in which transformers itself, with no policy, masks the image of a later turn in another way."""


@pytest.mark.parametrize(("name", "turn"), TURNS)
@torch.no_grad()
def test_later_turns_see_what_each_layer_saw(name: str, turn: str) -> None:
    """On caches of which layers that share keys no longer see all entries; the decoder would cut states there, too."""
    model, first = model_of(name), prompt(name, [(3, "I", 5)])
    second = prompt(name, [(4, "I", 3) if turn == "image" else (7,)], seed=2)
    joined = {key: joined_turns(key, value, second) for key, value in first.items()}
    with dropflow.attach(model, policy(a=random(1, 5, 6))) as flow:
        cache = DynamicCache(config=model.config.get_text_config())
        model(**first, **{CACHE_ARGUMENT: cache})
        later = second | {"attention_mask": joined["attention_mask"], CACHE_ARGUMENT: cache}
        logits = model(**later, logits_to_keep=2).logits
        live = flow.live()  # of both turns, which were fed one after the other
    assert live.shape[2] == joined["input_ids"].shape[1]
    with MaskedOracle(model, live):
        expected = model(**joined, use_cache=False).logits[:, -2:]
    assert relative_error(logits, expected) < 3e-5


def joined_turns(key: str, value: Tensor, second: dict[str, Any]) -> Tensor:
    """An input of a prompt that both turns form; pictures are concatenated, tokens appended."""
    if key not in second:
        return value
    return torch.cat((value, second[key]), 0 if "pixel" in key or "position" in key else 1)


@pytest.mark.parametrize("name", SHARING)
@torch.no_grad()
def test_taken_back_drafts_and_caches_without_config(name: str) -> None:
    model, inputs = model_of(name), prompt(name, [(3, "I", 12)])
    inputs["input_ids"][0, 1:4] = inputs["input_ids"][0, -3:]  # something to look up
    with dropflow.attach(model, policy(a=random(1, 5, 6))):
        greedy = model.generate(**inputs, **BUDGET)
        looked_up = model.generate(**inputs, **BUDGET, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
        made = model.generate(**inputs, **BUDGET, **{CACHE_ARGUMENT: DynamicCache()})
    assert torch.equal(looked_up, greedy)
    assert torch.equal(made, greedy)


@pytest.mark.parametrize("boundary", [4, 5, 6, 7])
@pytest.mark.parametrize("name", SHARING)
@torch.no_grad()
def test_attention_rows_equal_the_eager_map_of_the_live_tokens(name: str, boundary: int) -> None:
    model, inputs = model_of(name, "eager"), prompt(name, [(3, "I", 5)])
    with dropflow.attach(model, policy(a=random(1, 3), rows={"use": rows_at(boundary)})) as flow:
        model(**inputs)
        found, live = dict(flow.plan.stages)["rows"].rows[0], flow.live()
    maps: list[Tensor] = []
    attention = FAMILIES[name][0](model).text._modules["layers"]._modules[str(boundary)].self_attn
    handle = attention.register_forward_hook(lambda _, __, output: maps.append(output[1]))
    with MaskedOracle(model, live):
        model(**inputs, use_cache=False)
    handle.remove()
    seen = live[boundary, 0]
    assert 0 < int(seen.sum()) < len(seen)
    assert relative_error(found, maps[0][0, :, -1, seen]) < 1e-5


class Unforeseen(Stage[Any]):
    """Vision enters at boundary 3, which no forecast says."""

    @dropflow.hookimpl
    def inject(self, call: WindowCall) -> int:  # noqa: ARG002
        return 3


LATE = policy(i={"use": "hidrop/late-injection", "at": 3}, a=random(4))
TOLD = r"stages\.i: vision enters at boundary 3, but layer 6 reads the keys of layer 2, which would have none for it; "


@pytest.mark.parametrize("name", SHARING)
def test_entry_after_a_producer_is_refused_when_attaching(name: str) -> None:
    with pytest.raises(PolicyError, match=TOLD + "enter at boundary 2 or before"):
        dropflow.attach(model_of(name), LATE)
    dropflow.attach(model_of(name), policy(i=LATE["stages"]["i"], e={"use": "hidrop/early-exit", "at": 5})).detach()


@torch.no_grad()
def test_entry_after_a_producer_is_refused_at_the_call_if_nothing_forecast_it() -> None:
    model = model_of("gemma4")
    ran: list[Any] = []
    handle = model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with dropflow.attach(model, policy(i={"use": Unforeseen})), pytest.raises(DecisionError, match=TOLD):
        model(**prompt("gemma4"))
    handle.remove()
    assert not ran, "refused only after a layer has run"


@torch.no_grad()
def test_without_the_refusal_late_entry_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vision that enters after a producer has no keys there, so that later layers do not see it at all."""
    monkeypatch.setattr(decide_window, "late_entry", lambda *_: None)
    model, inputs = model_of("gemma4"), prompt("gemma4", [(3, "I", 5)])
    with dropflow.attach(model, policy(i={"use": Unforeseen})) as flow:
        logits, live = model(**inputs).logits, flow.live()
    with MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).logits
    assert relative_error(logits, expected) > 0.05


class OneRope(Gemma4):
    """A backbone that shares keys and says that its positions can be renumbered."""

    linear_positions = True


def test_compact_positions_are_refused_where_keys_are_shared() -> None:
    with pytest.raises(PolicyError, match=r"positions: `compact` .* but layer 5 reads keys that layer 4 has rotated"):
        dropflow.attach(model_of("gemma4"), {**policy(a=random(5)), "positions": "compact"}, adapter=OneRope)


def test_shared_states_are_not_handed_out_under_a_policy() -> None:
    model, told = model_of("gemma4"), r"return_shared_kv_states: .* share keys of different tokens"
    with dropflow.attach(model, policy(a=random(5))), pytest.raises(UnsupportedCall, match=told):
        model(**prompt("gemma4"), return_shared_kv_states=True)


def test_sharing_in_a_way_that_the_engine_does_not_know_is_refused() -> None:
    model = FAMILIES["llava"][1].model()
    model.get_decoder().config.num_kv_shared_layers = 2
    with pytest.raises(UnsupportedModel, match=r"layer 4 shares the keys of layer 3, but not through an argument"):
        dropflow.attach(model, policy(a=random(1)))


@torch.no_grad()
def test_a_policy_that_keeps_everything_is_bit_identical_although_the_decoder_cuts_states() -> None:
    """In `generate`, Gemma 4 runs layers that share keys on the last token only; a policy needs all of them there."""
    model, inputs = model_of("gemma4"), prompt("gemma4")
    plain = model.generate(**inputs, **BUDGET)
    with dropflow.attach(model, policy(a={"use": "control/keep-all"})):
        assert torch.equal(model.generate(**inputs, **BUDGET), plain)


def test_the_shape_names_producers_and_layers_with_entries() -> None:
    backbone: Backbone = FAMILIES["gemma4"][0](model_of("gemma4"))
    assert backbone.shape.producers == ((5, 4), (6, 2), (7, 2))
    assert backbone.shape.holding == (0, 1, 2, 3, 4)
    assert backbone.shape.producer(5) == 4
    assert backbone.shape.producer(4) is None


def shared_layer() -> FlowLayer:
    """A cache layer of six text tokens in two samples, of which layer 7 sees others in either sample."""
    layer = FlowLayer()
    keys = torch.arange(12.0).view(2, 1, 6, 1)
    layer.lazy_initialization(keys, keys)
    layer.keys = layer.values = keys
    layer.set_index(KeyIndex.plain(2, 6, keys.device))
    layer.shared[7] = layer.index.narrowed(torch.tensor([[True, False, True], [False, True, True]]))
    return layer


def seen_keys(layer: FlowLayer) -> list[list[float]]:
    """The keys that layer 7 sees, by sample."""
    index = layer.seen_by(7)
    assert index is not None
    index = index.upto(layer.length)
    assert torch.equal(index.logical, layer.full_index().logical)
    return [keys[own].tolist() for keys, own in zip(layer.keys[:, 0, :, 0], index.valid, strict=True)]


def test_what_a_layer_sees_follows_samples_tokens_taken_back_and_evictions() -> None:
    first, second = [0.0, 1, 2, 3, 5], [6.0, 7, 8, 10, 11]
    assert seen_keys(shared_layer()) == [first, second]
    layer = shared_layer()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert seen_keys(layer) == [second, second]
    layer = shared_layer()
    layer.batch_repeat_interleave(2)
    assert seen_keys(layer) == [first, first, second, second]
    layer.batch_select_indices(torch.tensor([3]))
    assert seen_keys(layer) == [second]
    layer = shared_layer()
    layer.crop(-2)
    assert seen_keys(layer) == [first[:-1], second[:-2]]
    layer = shared_layer()
    kept = LiveSet.of(torch.tensor([[True, False, True, True, True, True], [True, True, True, True, False, False]]))
    layer.evict(kept, layer.full_index().compacted(kept))
    assert seen_keys(layer) == [[0.0, 2, 3, 5], [6.0, 7, 8]]
    layer.reset()
    assert layer.shared == {}

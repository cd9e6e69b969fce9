"""`positions: compact` renumbers after every drop, the same alone and in a batch, and changes nothing without drops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HIDROP, KEEP_ALL, RAGGED, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import DynamicCache

import dropflow
from dropflow import CacheCall, CacheKeep, Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.positions import ranked
from dropflow.errors import PolicyError, UnsupportedCall

BUDGET = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def compact(which: dict[str, Any]) -> dict[str, Any]:
    return which | {"positions": "compact"}


class EvictAfterPrefill(Stage[Any]):
    """Keeps the first 3 visual entries of each sample in layers 2 and 3."""

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep:
        return CacheKeep({n: (call.layers[n].image_id >= 0).cumsum(1) <= 3 for n in (2, 3)})


EVICTING = policy(**RAGGED["stages"], evict={"use": EvictAfterPrefill})


def test_slots_name_the_token_that_had_their_rank() -> None:
    valid = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    live = LiveSet.of(torch.tensor([[0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0]]).bool())
    ranks = ranked(live, valid)
    assert live.index.tolist()[0][1:] == [2, 5]
    assert ranks.index.tolist()[0][1:] == [2, 3]
    assert ranks.index.tolist()[1] == [0, 1, 2]


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_dropping_nothing_is_bit_identical(llava: Any, side: str, mode: dict[str, Any]) -> None:
    inputs = prompt(side=side)
    plain, tokens = llava(**inputs).logits, llava.generate(**prompt(), **(BUDGET | mode))
    with dropflow.attach(llava, compact(KEEP_ALL)):
        assert torch.equal(llava(**inputs).logits, plain)
        assert torch.equal(llava.generate(**prompt(), **(BUDGET | mode)), tokens)


def by_hand(model: Any, inputs: dict[str, Tensor], live: Tensor) -> Tensor:
    """Logits of one sample's last live tokens, with every layer run on its own live rows at positions 0, 1, 2, ..."""
    text = model.get_decoder()
    hidden = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    hidden = hidden.masked_scatter((inputs["input_ids"] == 98)[..., None], torch.cat(list(features)))
    before = torch.ones_like(live[0])
    raw = hidden
    for number, layer in enumerate(text.layers):
        full = torch.zeros_like(raw)
        full[:, before] = hidden
        entering = live[number] & ~before
        full[:, entering] = raw[:, entering]
        hidden, before = full[:, live[number]], live[number]
        rotary = text.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
    logits: Tensor = model.lm_head(text.norm(hidden))
    return logits


@pytest.mark.parametrize("which", [HIDROP, RAGGED], ids=["hidrop", "ragged"])
@torch.no_grad()
def test_survivors_stand_at_their_rank(llava: Any, which: dict[str, Any]) -> None:
    inputs = prompt([(3, "I", 2, "I", 5)])
    with dropflow.attach(llava, compact(which)) as flow:
        logits, live = llava(**inputs).logits, flow.live()[:, 0]
    with dropflow.attach(llava, which):
        persistent = llava(**inputs).logits
    last = live[-1]
    assert relative_error(logits[:, last], by_hand(llava, inputs, live)) < 1e-5
    assert not torch.allclose(logits[:, last], persistent[:, last], atol=1e-3)


@pytest.mark.parametrize("which", [HIDROP, RAGGED, EVICTING], ids=["hidrop", "ragged", "evicting"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_every_sample_is_alone_in_its_batch(attention: str, which: dict[str, Any]) -> None:
    model, samples = tiny_llava(attention=attention), [(3, "I", 5), ("I", 2, "I", 9), (4, "I", 7)]
    inputs = prompt(samples)
    images = iter(inputs["pixel_values"])
    options = BUDGET | {"return_dict_in_generate": True, "output_logits": True}
    with dropflow.attach(model, compact(which)):
        together = model.generate(**inputs, **options)
        beams = model.generate(**inputs, **(BUDGET | {"num_beams": 2}))
        for number, parts in enumerate(samples):
            own = inputs["attention_mask"][number].bool()
            pixels = torch.stack([next(images) for part in parts if part == "I"])
            alone = {"input_ids": inputs["input_ids"][number, own][None], "pixel_values": pixels}
            output = model.generate(**alone, **options)
            for ours, theirs in zip(together.logits, output.logits, strict=True):
                assert relative_error(ours[number], theirs[0]) < 1e-5
            assert torch.equal(beams[number, -5:], model.generate(**alone, **(BUDGET | {"num_beams": 2}))[0, -5:])


@torch.no_grad()
def test_a_decoded_token_stands_at_the_length_of_each_layers_cache(llava: Any) -> None:
    inputs, seen = prompt([(3, "I", 5)]), []
    handles = [
        layer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
        for layer in llava.get_decoder()._modules["layers"]
    ]
    with dropflow.attach(llava, compact(EVICTING)):
        output = llava.generate(**inputs, **BUDGET, return_dict_in_generate=True)
    for handle in handles:
        handle.remove()
    lengths = [layer.keys.shape[2] for layer in getattr(output, CACHE_ARGUMENT).layers]
    assert lengths == [n + 4 for n in (25, 25, 9 + 3, 9 + 3, 11, 11)]
    for step in range(1, 5):
        decoded = [int(ids) for ids in seen[6 * step : 6 * step + 6]]
        assert decoded == [length - 5 + step for length in lengths]


@torch.no_grad()
def test_positions_that_count_padding_stay_consistent(llava: Any) -> None:
    """Without position ids the model counts padding: relative positions, and so the logits, must not change."""
    inputs, token = prompt([(3, "I", 5), (9, "I", 7)]), torch.tensor([[7], [7]])
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(token)), 1)
    with dropflow.attach(llava, compact(RAGGED)):
        cache, alone = DynamicCache(), DynamicCache()
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        logits = llava(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits[0]
        own = inputs["attention_mask"][0].bool()
        assert not own.all()
        llava(
            input_ids=inputs["input_ids"][:1, own], pixel_values=inputs["pixel_values"][:1], **{CACHE_ARGUMENT: alone}
        )
        expected = llava(input_ids=token[:1], **{CACHE_ARGUMENT: alone}).logits[0]
    assert relative_error(logits, expected) < 1e-5


@torch.no_grad()
def test_a_second_turn_continues_where_each_layer_stands(llava: Any) -> None:
    first, later = prompt([(3, "I", 5)]), prompt([(4, "I", 3)], seed=2)
    seen: list[Tensor] = []
    with dropflow.attach(llava, compact(RAGGED)) as flow:
        cache = DynamicCache()
        llava(**first, **{CACHE_ARGUMENT: cache})
        held = [layer.keys.shape[2] for layer in cache.layers]
        handles = [
            layer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
            for layer in llava.get_decoder()._modules["layers"]
        ]
        mask = torch.ones(1, first["input_ids"].shape[1] + later["input_ids"].shape[1], dtype=torch.long)
        llava(**(later | {"attention_mask": mask}), **{CACHE_ARGUMENT: cache})
        live = flow.live()[:, 0, first["input_ids"].shape[1] :]  # no step in between, so both are one prompt
    for handle in handles:
        handle.remove()
    assert len(set(held)) == 3
    for layer, ids in enumerate(seen):
        assert ids.tolist() == [list(range(held[layer], held[layer] + int(live[layer].sum())))]


@torch.no_grad()
def test_gradients_and_loss_are_those_of_survivors_at_their_rank() -> None:
    model, inputs = tiny_llava(), prompt([(3, "I", 5)])
    labels = inputs["input_ids"].masked_fill(torch.arange(25) < 24, -100)
    with dropflow.attach(model, compact(RAGGED)) as flow:
        loss, live = model(**inputs, labels=labels).loss, flow.live()[:, 0]
    logits = by_hand(model, inputs, live)[0, -2]
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels[0, -1]).item(), rel=1e-5)


def test_positions_of_several_dimensions_are_refused(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(25).expand(3, 1, -1)
    ran: list[int] = []
    handle = llava.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    with (
        dropflow.attach(llava, compact(RAGGED)),
        pytest.raises(UnsupportedCall, match=r"position_ids: of shape \(3, 1, 25\).*`positions: persistent`"),
    ):
        llava(**prompt([(3, "I", 5)]), position_ids=ids)
    handle.remove()
    assert not ran
    config = llava.get_decoder().config
    for parameters in (
        {"rope_type": "default", "mrope_section": [2, 1, 1]},
        {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
    ):
        monkeypatch.setattr(config, "rope_parameters", parameters)
        with pytest.raises(PolicyError, match=r"positions: `compact` renumbers one position per token"):
            dropflow.attach(llava, compact(RAGGED))
        dropflow.attach(llava, RAGGED).detach()

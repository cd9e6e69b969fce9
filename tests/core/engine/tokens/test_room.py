"""Room to grow: what is held is bit by bit what plain concatenation would hold, whatever happens in between."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RAGGED, policy, prompt, tiny_llava
from torch import Tensor
from transformers import DynamicCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens import room
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.room import LEAST, Room

KEEP_ALL = policy(all={"use": "control/keep-all"})
SMALL = room.SMALL


@pytest.fixture(autouse=True)
def _room_for_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as tiny as those of these tests make room, too."""
    monkeypatch.setattr(room, "SMALL", 0)


def entries(count: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, 3, count, 4, generator=dice)
    return keys, -keys


def a_layer(count: int = 5, batch: int = 2) -> FlowLayer:
    layer = FlowLayer()
    layer.update(*entries(count, 0, batch))
    layer.set_index(KeyIndex.plain(batch, count, torch.device("cpu")))
    return layer


def grown(layer: FlowLayer, steps: int, first: int = 1) -> None:
    for seed in range(first, first + steps):
        layer.update(*entries(1, seed, layer.keys.shape[0]))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def test_steps_write_in_place_and_copy_seldom() -> None:
    layer, storages, seen = a_layer(), [], []
    expected = entries(5, 0)[0]
    for seed in range(1, 200):
        keys, values = layer.update(*entries(1, seed))
        expected = torch.cat((expected, entries(1, seed)[0]), 2)
        assert keys is layer.keys
        assert torch.equal(keys, expected)
        assert torch.equal(values, -expected)
        storages.append(storage(keys))
        seen.append((keys, expected))
    assert len(set(storages)) == 4  # room for 64 more each time
    assert layer.keys.untyped_storage().nbytes() <= (204 + LEAST) * 2 * 3 * 4 * 4
    assert all(torch.equal(view, then) for view, then in seen)  # what was handed out stays what it was


@torch.no_grad()
def test_small_layers_are_copied_until_they_have_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SMALL", SMALL)
    layer, roomy = FlowLayer(), []
    wide = torch.randn(2, 8, 1, 64, generator=torch.Generator().manual_seed(0))  # 4 KiB
    for step in range(70):
        before = None if step == 0 else storage(layer.keys)
        layer.update(wide * step, -wide * step)
        if storage(layer.keys) == before:
            roomy.append(step)
    # 32 entries are not small any more: their first append is a copy, the second makes room, the third writes in place
    assert roomy == list(range(SMALL // 4096 + 2, 70))
    expected = torch.cat([wide * step for step in range(70)], 2)
    assert torch.equal(layer.keys, expected)
    assert torch.equal(layer.values, -expected)


@torch.no_grad()
def test_what_was_there_before_the_first_write_is_never_written_to() -> None:
    """Two caches that start from the same tensors, one of them a slice of a longer one, as those of a prefix."""
    whole = entries(9, 0)
    before = [own.clone() for own in whole]
    layers = []
    for _ in range(2):
        layer = FlowLayer()
        layer.lazy_initialization(*whole)
        layer.keys, layer.values = (own[:, :, :5] for own in whole)
        layer.set_index(KeyIndex.plain(2, 5, torch.device("cpu")))
        layers.append(layer)
    grown(layers[0], 4)
    grown(layers[1], 4, first=11)
    assert all(torch.equal(own, then) for own, then in zip(whole, before, strict=True))
    for layer, first in zip(layers, (1, 11), strict=True):
        expected = torch.cat([before[0][:, :, :5], *(entries(1, first + step)[0] for step in range(4))], 2)
        assert torch.equal(layer.keys, expected)


OPERATIONS = ("step", "step", "step", "two", "crop", "reorder", "repeat", "select", "evict", "assign", "copy", "pickle")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=25), st.sampled_from(["no_grad", "inference"]))
def test_any_order_of_operations_holds_what_concatenation_holds(operations: list[str], mode: str) -> None:
    with torch.inference_mode() if mode == "inference" else torch.no_grad():
        layer = a_layer()
        twin = layer.keys.clone()
        for seed, operation in enumerate(operations, start=1):
            layer, twin = applied(operation, layer, twin, seed)
            assert torch.equal(layer.keys, twin), operation
            assert torch.equal(layer.values, -twin), operation
            assert layer.length == layer.index.length + twin.shape[2] - len(layer.index)


def applied(operation: str, layer: FlowLayer, twin: Tensor, seed: int) -> tuple[FlowLayer, Tensor]:
    batch = twin.shape[0]
    if operation in ("step", "two"):
        new = entries(1 if operation == "step" else 2, seed, batch)
        layer.update(*new)
        return layer, torch.cat((twin, new[0]), 2)
    if operation == "crop":
        if twin.shape[2] > 2:
            layer.crop(-1)
            twin = twin[:, :, :-1].clone()
    elif operation in ("reorder", "select"):
        rows = torch.arange(batch - 1, -1, -1)
        (layer.reorder_cache if operation == "reorder" else layer.batch_select_indices)(rows)
        twin = twin[rows]
    elif operation == "repeat" and batch < 8:
        layer.batch_repeat_interleave(2)
        twin = twin.repeat_interleave(2, 0)
    elif operation == "evict" and twin.shape[2] > 2:
        stays = torch.ones(batch, twin.shape[2], dtype=torch.bool)
        stays[:, 1] = False
        kept = LiveSet.of(stays)
        layer.evict(kept, layer.full_index().compacted(kept))
        twin = twin[:, :, stays[0]]
    elif operation == "assign":
        layer.keys, layer.values = twin.clone(), -twin
    elif operation == "copy":
        other = copy.deepcopy(layer)
        layer.update(*entries(1, seed + 1000, batch))  # must not be seen by the copy
        layer = other
    elif operation == "pickle":
        layer = pickle.load(io.BytesIO(pickle.dumps(layer)))
    return layer, twin


@torch.no_grad()
def test_a_shallow_copy_grows_by_itself() -> None:
    layer = a_layer()
    grown(layer, 3)
    other = copy.copy(layer)
    grown(layer, 2)
    grown(other, 2, first=21)
    assert torch.equal(layer.keys[:, :, -1:], entries(1, 2)[0])
    assert torch.equal(other.keys[:, :, -1:], entries(1, 22)[0])


def test_gradients_get_ordinary_copies() -> None:
    layer = a_layer()
    with torch.no_grad():
        grown(layer, 3)
    roomy = storage(layer.keys)
    keys = torch.randn(2, 3, 1, 4, requires_grad=True)
    layer.update(keys, keys * 2)
    assert storage(layer.keys) != roomy
    saved = layer.keys.pow(2).sum() + layer.values.pow(2).sum()
    with torch.no_grad():
        grown(layer, 4)  # writes nowhere that the graph remembers
    saved.backward()
    assert torch.allclose(keys.grad, 10 * keys.detach())


def test_a_buffer_made_in_inference_mode_is_not_written_outside_it() -> None:
    layer = a_layer()
    with torch.inference_mode():
        grown(layer, 3)
    first = storage(layer.keys)
    with torch.no_grad():
        grown(layer, 3, first=4)
        assert storage(layer.keys) != first
        expected = torch.cat([entries(5, 0)[0], *(entries(1, seed)[0] for seed in range(1, 7))], 2)
    assert torch.equal(layer.keys, expected)


@torch.no_grad()
def test_entries_that_do_not_fit_are_refused_as_by_torch() -> None:
    layer = a_layer()
    grown(layer, 3)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(*entries(1, 9, batch=1))  # a write in place would have repeated it for every sample


@torch.no_grad()
def test_an_emptied_layer_gives_up_its_room() -> None:
    layer = a_layer()
    grown(layer, 3)
    layer.reset()
    assert layer.length == 0
    assert all(room._whole is None for room in layer.rooms)
    assert isinstance(layer.rooms[0], Room)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_answers_have_the_same_bits_with_room_and_without(attention: str, monkeypatch: Any) -> None:
    model, inputs = tiny_llava(attention=attention), prompt()
    budget = {"max_new_tokens": 90, "min_new_tokens": 90, "do_sample": False, "output_logits": True}
    for which in (KEEP_ALL, RAGGED):
        found = []
        for roomy in (True, False):
            if not roomy:
                monkeypatch.setattr(Room, "appended", lambda _, held, new: torch.cat([held, new], -2))
            with dropflow.attach(model, which):
                output = model.generate(**inputs, **budget, return_dict_in_generate=True)
            found.append(output)
            monkeypatch.undo()
        assert torch.equal(found[0].sequences, found[1].sequences)
        for one, other in zip(found[0].logits, found[1].logits, strict=True):
            assert torch.equal(one, other)


@torch.no_grad()
def test_a_crop_and_another_answer_leave_the_first_answer_its_entries(llava: Any) -> None:
    cache, token = DynamicCache(), torch.tensor([[5]])
    with dropflow.attach(llava, KEEP_ALL):
        llava(**prompt(((3, "I", 5),)), **{CACHE_ARGUMENT: cache})
        for _ in range(4):
            llava(input_ids=token, **{CACHE_ARGUMENT: cache})
        first = cache.layers[0].keys
        before = first.clone()
        cache.crop(-2)
        llava(input_ids=token + 1, **{CACHE_ARGUMENT: cache})
    assert torch.equal(first, before)
    assert not torch.equal(cache.layers[0].keys[:, :, -1], before[:, :, -2])


@pytest.mark.parametrize("change", [lambda keys: keys * 2, lambda keys: keys[..., :-2, :], lambda keys: keys.half()])
@torch.no_grad()
def test_other_contents_of_the_same_tensor_object_are_held(change: Any) -> None:
    layer = a_layer()
    grown(layer, 3)
    before, view = layer.keys.clone(), layer.keys[...]
    layer.keys.data = change(layer.keys.data)
    expected, new = layer.keys.clone(), entries(1, 9)[0]
    layer.update(new, new)
    assert torch.equal(layer.keys, torch.cat((expected, new), 2))
    assert torch.equal(view, before)


@torch.no_grad()
def test_an_emptied_cache_serves_text_with_beams_and_crops(llava: Any) -> None:
    """Entries that follow a reset have no index, and are picked and taken back like others."""
    text, beams = prompt([(7,), (9,)]), {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 3}
    with dropflow.attach(llava, RAGGED):
        expected, plain = llava.generate(**text, **beams), llava(**text)
        cache = DynamicCache()
        llava(**prompt(), **{CACHE_ARGUMENT: cache})
        cache.reset()
        assert torch.equal(llava.generate(**text, **beams, **{CACHE_ARGUMENT: cache}), expected)
        cache.reset()
        llava(**text, **{CACHE_ARGUMENT: cache})
        cache.crop(-2)
        assert cache.get_seq_length() == text["input_ids"].shape[1] - 2
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        more = {"input_ids": text["input_ids"][[1, 0], -2:], "attention_mask": text["attention_mask"][[1, 0]]}
        found = llava(**more, **{CACHE_ARGUMENT: cache}).logits[:, -1]
    assert torch.allclose(found, plain.logits[[1, 0], -1], atol=1e-4)

"""What stages after the projector are told of a tower whose rows are pooled, packed or joined on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dropflow
from dropflow import Encode, EncodeCall, Stage, VisionReader, hookimpl
from dropflow.errors import DecisionError, PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.testing import tiny_models
from dropflow.testing.case import relative_error
from dropflow.testing.families.tiny import Part, Tiny
from dropflow.testing.kit import VIDEO_SAMPLES
from dropflow.testing.probes import policy, use

ONE: tuple[tuple[Part, ...], ...] = ((2, "I", 3),)


class Reads(Stage[Any]):
    """Records what two layers say, and decides nothing."""

    needs = frozenset({"vision_attention"})
    vision_taps = (0, -1)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.seen: list[tuple[Tensor, ...]] = []

    @hookimpl
    def encode(self, call: EncodeCall) -> None:
        for layer in self.vision_taps:
            self.seen += [call.received_attention(layer), call.unit_keys(layer), call.unit_keys(layer, joined=True)]


class Pairs(Stage[Any]):
    """Merges rows in pairs, in reverse, after dropping every fifth."""

    says = True

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        shares = []
        for own in call.features:
            pairs = torch.eye(len(own)).unflatten(0, (-1, 2)).mean(1).flip(0)
            shares.append(pairs)
        rows = tuple(matrix @ own for matrix, own in zip(shares, call.features, strict=True))
        places = tuple(own[: len(new)] for own, new in zip(call.places, rows, strict=True))
        return Encode(rows=rows, places=places, shares=(lambda: tuple(shares)) if self.says else None)


class Silent(Pairs):
    says = False


class Halves(Stage[Any]):
    """Drops every other row."""

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        return Encode(keep=tuple(places % 2 == 0 for places in call.places))


def read(model: Any, inputs: dict[str, Any], **before: Any) -> list[tuple[Tensor, ...]]:
    """What the last stage of a policy is told."""
    with dropflow.attach(model, policy(**before, read=use(Reads))) as flow, torch.no_grad():
        model(**inputs)
        stage: Any = dict(flow.plan.stages)["read"]
    found: list[tuple[Tensor, ...]] = stage.seen
    return found


def qwen(attention: str = "sdpa") -> tuple[Any, Tiny]:
    _, tiny = tiny_models()["qwen2_5_vl"]
    return tiny.model(attention), tiny


@contextmanager
def packed_kernel() -> Iterator[list[int]]:
    """A stand-in for flash attention, which computes all segments in one call; counts the calls."""
    calls: list[int] = []

    def flash(_: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        assert attention_mask is None
        lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        calls.append(len(lengths))
        cut = zip(*(torch.split(part, lengths, 2) for part in (query, key, value)), strict=True)
        scale = kwargs["scaling"]
        done = [torch.nn.functional.scaled_dot_product_attention(*parts, scale=scale) for parts in cut]
        return torch.cat(done, 2).transpose(1, 2).contiguous(), None

    table = vars(ALL_ATTENTION_FUNCTIONS)["_local_mapping"]
    before = table.get("flash_attention_2")
    table["flash_attention_2"] = flash
    try:
        yield calls
    finally:
        table.pop("flash_attention_2")
        if before is not None:
            table["flash_attention_2"] = before


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_a_kernel_that_computes_all_segments_at_once_is_cut_where_it_cuts(family: str) -> None:
    adapter, tiny = tiny_models()[family]
    inputs, _ = tiny.prompt(VIDEO_SAMPLES if "video" in tiny.pictures else ((3, "I", 2), (1, "I", 1, "I", 2)))
    expected = read(tiny.model(), inputs)
    model = tiny.model()
    reader = adapter(model).reader()
    assert reader is not None
    tower = next(module for module in model.modules() if getattr(module, "config", None) is reader.owner.config)
    tower.config._attn_implementation = "flash_attention_2"
    with packed_kernel() as calls:
        found = read(model, inputs)
    assert max(calls) > 1
    assert len(found) == len(expected) > 0
    for own, true in zip(found, expected, strict=True):
        for value, right in zip(own, true, strict=True):
            assert relative_error(value, right) < 1e-5


def test_what_is_said_of_merged_rows_is_the_mean_over_their_members() -> None:
    model, tiny = qwen()
    inputs, _ = tiny.prompt(((3, "I", 5), (1, "I", 2, "I", 2)))
    whole, merged = read(model, inputs), read(model, inputs, pairs=use(Pairs))
    twice = read(model, inputs, half=use(Halves), pairs=use(Pairs), again=use(Halves))
    for full, pairs, few in zip(whole, merged, twice, strict=True):
        for own, mean, left in zip(full, pairs, few, strict=True):
            assert relative_error(mean, own.unflatten(0, (-1, 2)).mean(1).flip(0)) < 1e-5
            # pairs of every other row, in reverse at the places 0, 2, 4, ...: all even, so that all stay
            assert relative_error(left, own[::2].unflatten(0, (-1, 2)).mean(1).flip(0)) < 1e-5


def test_rows_merged_without_saying_which_are_not_ranked() -> None:
    model, tiny = qwen()
    message = r"stages\.read: .*stages\.pairs has merged rows since that layer ran, without saying which; give `Encode"
    with pytest.raises(DecisionError, match=message):
        read(model, tiny.prompt(ONE)[0], pairs=use(Silent))


@pytest.mark.parametrize("asked", ["query_keys", "attention_rows"])
def test_what_only_separate_rows_have_is_refused(asked: str) -> None:
    class Asks(Reads):
        @hookimpl
        def encode(self, call: EncodeCall) -> None:
            getattr(call, asked)(0, *([torch.zeros(1, 1).long()] if asked == "attention_rows" else []))

    model, tiny = qwen()
    with (
        pytest.raises(
            DecisionError, match=rf"{asked}: on this backbone a row is made of several rows of the vision en"
        ),
        dropflow.attach(model, policy(s=use(Asks))),
    ):
        model(**tiny.prompt(ONE)[0])


def test_a_layer_that_was_not_tapped_has_nothing_to_say() -> None:
    class Elsewhere(Reads):
        @hookimpl
        def encode(self, call: EncodeCall) -> None:
            call.received_attention(0)

    Elsewhere.vision_taps = (1,)  # type: ignore[assignment]
    model, tiny = qwen()
    with (
        pytest.raises(DecisionError, match=r"attention of vision layer 0: list the layer in the stage's `vision_taps`"),
        dropflow.attach(model, policy(s=use(Elsewhere))),
    ):
        model(**tiny.prompt(ONE)[0])


def test_a_table_that_does_not_fit_the_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, tiny = tiny_models()["internvl"]
    reader = adapter.reader

    def changed(change: Any, weights: Any = None) -> None:
        def other(self: Any, modality: str = "image") -> VisionReader:
            right: VisionReader = reader(self, modality)  # type: ignore[assignment]
            return VisionReader(
                right.owner,
                lambda *given: change(right.members(*given)),
                "layer",
                prefix=1,
                has_cls=True,
                weights=weights and (lambda *given: weights(right.members(*given))),
            )

        monkeypatch.setattr(adapter, "reader", other)

    for change, message in (
        (lambda own: [table[1:] for table in own], r"states entries of \[8\] rows in `members`, but the features have"),
        (lambda own: [table + 1 for table in own], r"states row 37 in `members`, .*and the tower has 37; correct the"),
    ):
        changed(change)
        with pytest.raises(UnsupportedModel, match=message):
            read(tiny.model(), tiny.prompt(ONE)[0])
    for weights, message in (
        (lambda own: [table[1:].float() for table in own], r"states entries of \[8\] rows in `weights`, but"),
        (
            lambda own: [table[:, :1].float() for table in own],
            r"states other shapes in `weights` than in `members`, but",
        ),
    ):
        changed(lambda own: own, weights)
        with pytest.raises(UnsupportedModel, match=message):
            read(tiny.model(), tiny.prompt(ONE)[0])


def test_layers_that_do_not_exist_and_towers_that_nobody_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(Reads):
        vision_taps = (2, -3)

    model, _ = qwen()
    with pytest.raises(PolicyError, match=r"stages\.s: reads vision layer 2 and 1 more, expected 0 to 1; name a layer"):
        dropflow.attach(model, policy(s=use(Deep)))

    class Needless(Reads):
        needs = frozenset()

    monkeypatch.setattr(tiny_models()["qwen2_5_vl"][0], "reader", lambda *_: None)
    with pytest.raises(
        PolicyError, match=r"stages\.s: reads the attention of the vision encoder, which this adapter d"
    ):
        dropflow.attach(model, policy(s=use(Needless)))
    with pytest.raises(PolicyError, match=r"stages\.s: needs vision_attention, which the adapter Qwen25VL cannot give"):
        dropflow.attach(model, policy(s=use(Reads)))


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "mistral3", "video_llava"])
def test_the_tower_is_as_it_was(family: str) -> None:
    adapter, tiny = tiny_models()[family]
    model, (inputs, _) = tiny.model(), tiny.prompt(ONE)
    backbone = adapter(model)
    readers = [backbone.reader(modality) for modality in backbone.modalities]
    with torch.no_grad():
        plain = model(**inputs).logits
    lists = [reader.owner._modules[reader.layers] for reader in readers if reader is not None]
    kinds = [type(one) for one in lists]
    with dropflow.attach(model, policy(read=use(Reads))), torch.no_grad():
        try:
            assert torch.equal(model(**inputs).logits, plain)
        except UnsupportedCall:  # features made without the policy
            pytest.skip("this transformers encodes images past the core's methods")
        standing = [reader.owner._modules[reader.layers] for reader in readers if reader is not None]
        assert all(new is not old for new, old in zip(standing, lists, strict=True))
    found = [reader.owner._modules[reader.layers] for reader in readers if reader is not None]
    assert [type(one) for one in found] == kinds
    assert all(new is old for new, old in zip(found, lists, strict=True))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_of_checkpointed_layers_is_not_read(reentrant: bool) -> None:
    _, tiny = tiny_models()["qwen3_vl"]
    model, (inputs, _) = tiny.model().train(), tiny.prompt(ONE)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plain = read(model, inputs)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with dropflow.attach(model, policy(keys={"use": "mustdrop/key-set"}, read=use(Reads))) as flow:
            model(**inputs).loss.backward()
            seen: Any = dict(flow.plan.stages)["read"]
        assert len(seen.seen) == len(plain)
        for own, true in zip(seen.seen, plain, strict=True):
            assert all(relative_error(value.detach(), right) < 1e-5 for value, right in zip(own, true, strict=True))
        grads.append(model.model.visual.blocks[0].attn.qkv.weight.grad.clone())
    assert relative_error(grads[1], grads[0]) < 1e-5

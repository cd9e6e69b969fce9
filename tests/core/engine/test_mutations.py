"""Seven plausible bugs, injected one at a time: the checks of this suite catch each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import HIDROP, RAGGED, policy, prompt, relative_error, tiny_llava
from torch import Tensor

import dropflow
from dropflow import PruneCall, Stage, hookimpl
from dropflow.engine.decoder.probe import LayerProbe
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.masks import gather_mask
from dropflow.engine.tokens.restricting import restrict
from dropflow.errors import UnsupportedCall
from dropflow.testing import MaskedOracle

Patch = pytest.MonkeyPatch


@torch.no_grad()
def forward_equals_the_masked_run() -> None:
    model, inputs = tiny_llava(), prompt()
    for which in (HIDROP, RAGGED):
        with dropflow.attach(model, which) as flow:
            logits, live = model(**inputs).logits, flow.live()
        with MaskedOracle(model, live):
            expected = model(**inputs, use_cache=False).logits
        real = inputs["attention_mask"].bool()
        assert relative_error(logits[real], expected[real]) < 1e-5


@torch.no_grad()
def beams_equal_the_masked_run() -> None:
    model, inputs = tiny_llava(), prompt()
    budget = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with dropflow.attach(model, HIDROP) as flow:
        tokens = model.generate(**inputs, **budget)
        live = flow.live()[:, ::3]
    with MaskedOracle(model, live):
        assert torch.equal(tokens, model.generate(**inputs, **budget, use_cache=False))


@torch.no_grad()
def scores_are_those_of_the_boundarys_layer() -> None:
    scores: list[Tensor] = []

    class Reads(Stage[Any]):
        prune_at = (3,)

        @hookimpl
        def prune(self, call: PruneCall) -> None:
            scores.append(call.attention_rows(3, call.instruction_slots))

    inputs = prompt([(3, "I", 5)])
    with dropflow.attach(tiny_llava(), policy(read={"use": Reads})) as flow:
        flow._hooks.backbone.model(**inputs)
    expected = tiny_llava(attention="eager")(**inputs, output_attentions=True).attentions[3][:, :, -1:]
    assert relative_error(scores[0], expected) < 1e-5


def compact_positions(patch: Patch) -> None:
    def renumbered(name: str, value: Any, live: LiveSet, more: Any) -> Any:
        ranks = torch.arange(live.slots).expand(live.index.shape)
        return restrict(name, value, LiveSet(ranks, live.valid, live.total), more)

    patch.setattr("dropflow.engine.decoder.layer_arguments.restrict", renumbered)


def unmasked_padding(patch: Patch) -> None:
    def trusting(mask: Tensor | None, live: LiveSet, keys: KeyIndex, **more: Any) -> Tensor | None:
        return gather_mask(mask, live, KeyIndex(keys.logical, None, keys.image_id, keys.length), **more)

    patch.setattr("dropflow.engine.decoder.layer_arguments.gather_mask", trusting)


def forgotten_beam_reorder(patch: Patch) -> None:
    patch.setattr(FlowLayer, "reorder_cache", lambda *_: None)


def physical_cache_length(patch: Patch) -> None:
    patch.setattr(FlowLayer, "length", property(lambda layer: layer.keys.shape[-2] if layer.is_initialized else 0))


def zero_reentry(patch: Patch) -> None:
    original = LiveSet.restrict

    def forgetful(self: LiveSet, previous: LiveSet, states: Tensor, raw: Tensor | None) -> Tensor:
        return original(self, previous, states, None if raw is None else torch.zeros_like(raw))

    patch.setattr(LiveSet, "restrict", forgetful)


def expansion_off_by_one(patch: Patch) -> None:
    original = LiveSet.expand
    patch.setattr(LiveSet, "expand", lambda self, states: original(self, states.roll(1, 1)))


def score_one_layer_early(patch: Patch) -> None:
    original, attach, attached = LayerProbe.__init__, dropflow.attach, []

    def remembering(model: Any, *args: Any, **kwargs: Any) -> Any:
        attached.append(model)
        return attach(model, *args, **kwargs)

    def early(self: LayerProbe, number: int, _: Any, *rest: Any, **more: Any) -> None:
        original(self, number, [*attached[-1].get_decoder()._modules["layers"].children()][number - 1], *rest, **more)

    patch.setattr(dropflow, "attach", remembering)
    patch.setattr(LayerProbe, "__init__", early)


BUGS: dict[Callable[[Patch], None], Callable[[], None]] = {
    compact_positions: forward_equals_the_masked_run,
    unmasked_padding: forward_equals_the_masked_run,
    forgotten_beam_reorder: beams_equal_the_masked_run,
    physical_cache_length: beams_equal_the_masked_run,
    zero_reentry: forward_equals_the_masked_run,
    expansion_off_by_one: forward_equals_the_masked_run,
    score_one_layer_early: scores_are_those_of_the_boundarys_layer,
}


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    check = BUGS[plant]
    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, UnsupportedCall)):
        check()

"""What a stage notes about samples for later boundaries, and values and states of layers that have run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from tiny import policy, prompt, relative_error, tiny_llava
from torch import Tensor

import dropflow
from dropflow import Keep, PruneCall, Stage, hookimpl
from dropflow.errors import DecisionError
from dropflow.testing import tiny_models


class Noting(Stage[Any]):
    """Notes how many visual tokens each sample has, and every boundary's number; drops every fourth token at 2."""

    seen: ClassVar[list[PruneCall]] = []
    prune_at = (1, 2, 4)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        self.seen.append(call)
        mask = torch.ones_like(call.valid)
        counts = (call.image_id >= 0).sum(1).float()
        if call.boundary == 2:
            return Keep(call.index % 4 != 0)
        return Keep(mask, notes=torch.stack((counts, torch.full_like(counts, call.boundary)), 1))


class Reading(Stage[Any]):
    """Sees what others noted."""

    seen: ClassVar[list[PruneCall]] = []
    prune_at = (2, 4, 5)

    @hookimpl
    def prune(self, call: PruneCall) -> None:
        self.seen.append(call)


@torch.no_grad()
def test_notes_of_a_call_reach_later_boundaries_of_every_stage() -> None:
    model, inputs = tiny_llava(), prompt()
    with dropflow.attach(model, policy(noting={"use": Noting}, reading={"use": Reading})):
        for _ in range(2):  # a call begins without notes
            Noting.seen.clear()
            Reading.seen.clear()
            model(**inputs)
            first, second, third = Noting.seen
            assert dict(first.notes) == {}
            before = [[16.0, 1.0], [32.0, 1.0], [0.0, 1.0]]
            assert second.notes["noting"].tolist() == third.notes["noting"].tolist() == before
            told = [call.notes["noting"].tolist() for call in Reading.seen]
            after = [[float((third.image_id[sample] >= 0).sum()), 4.0] for sample in range(3)]
            assert told == [before, before, after]
            assert after[0][0] < 16
    with pytest.raises(TypeError):
        first.notes["other"] = torch.zeros(3)  # type: ignore[index]  # that it cannot be set is what is tested


@torch.no_grad()
def test_notes_are_one_entry_for_each_sample() -> None:
    class Wrong(Noting):
        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            return Keep(torch.ones_like(call.valid), notes=torch.zeros(len(call.valid) + 1))

    model, inputs = tiny_llava(), prompt()
    plain = model(**inputs).logits
    message = r"stages\.noting: at boundary 1 `prune` returned notes of \(4,\), expected numbers for each of 3 samples"
    with dropflow.attach(model, policy(noting={"use": Wrong})), pytest.raises(DecisionError, match=message):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, plain)


class States(Stage[Any]):
    """Reads two layers at the boundary after them, and again after tokens have gone."""

    seen: ClassVar[dict[tuple[int, int], Any]] = {}
    taps = (1, 2)
    prune_at = (3, 5)
    reads_states = True

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        for layer in self.taps:
            self.seen[call.boundary, layer] = call.index, call.valid, call.values(layer), call.states(layer)
        return Keep((call.index % 3 > 0) | call.text)


@contextmanager
def watched(model: Any, layers: tuple[int, ...]) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Collects what v projections and layers of the text decoder return."""
    seen: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    handles = []
    for number in layers:
        layer = model.model.language_model.layers[number]
        for name, module in (("value", layer.self_attn.v_proj), ("state", layer)):
            keep = seen[number]
            handles.append(
                module.register_forward_hook(lambda _, __, out, keep=keep, name=name: keep.update({name: out}))
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_values_and_states_are_those_of_the_layer_for_the_tokens_that_are_live(family: str, attention: str) -> None:
    tiny = tiny_models()[family][1]
    model, (inputs, _) = tiny.model(attention), tiny.prompt()
    random = {"use": "control/random", "keep": {2: 0.5}}  # layer 2 runs on fewer tokens than layer 1
    States.seen.clear()
    with dropflow.attach(model, policy(random=random, states={"use": States})) as flow, watched(model, (1, 2)) as seen:
        model(**inputs)
        live = flow.live()
    if family == "qwen3_vl":  # what deepstack adds after the first two layers is part of what the next one gets
        seen[1]["state"] = None
    for (boundary, layer), (index, valid, values, states) in States.seen.items():
        for sample in range(len(valid)):
            own = index[sample, valid[sample]]
            tokens = live[layer, sample].nonzero()[:, 0]
            slots = torch.searchsorted(tokens, own)
            assert torch.equal(tokens[slots], own)
            for name, got in (("value", values[sample].transpose(0, 1).flatten(1)), ("state", states[sample])):
                whole = seen[layer][name]
                if whole is not None:
                    padded = whole[sample, -len(tokens) :] if whole.shape[1] < live.shape[2] else whole[sample, tokens]
                    assert torch.equal(got[valid[sample]], padded[slots]), (boundary, layer, name)
    assert len(States.seen) == 4
    assert States.seen[5, 1][0].shape[1] < States.seen[3, 1][0].shape[1]


@torch.no_grad()
def test_deepstack_is_part_of_the_states() -> None:
    tiny = tiny_models()["qwen3_vl"][1]
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5)])
    got: dict[int, Tensor] = {}

    class First(States):
        taps = (0, 1)
        prune_at = (2,)

        @hookimpl
        def prune(self, call: PruneCall) -> None:
            got.update({layer: call.states(layer) for layer in self.taps})
            got[2] = call.hidden

    handle = model.model.language_model.layers[1].register_forward_pre_hook(lambda _, args: got.update({-1: args[0]}))
    with dropflow.attach(model, policy(states={"use": First})):
        model(**inputs)
    handle.remove()
    assert torch.equal(got[0], got[-1])
    assert torch.equal(got[1], got[2])


@torch.no_grad()
def test_what_is_not_kept_is_refused() -> None:
    model, inputs = tiny_llava(), prompt()

    class Unasked(States):
        reads_states = False

    class Untapped(States):
        @hookimpl
        def prune(self, call: PruneCall) -> None:
            call.states(0)

    late = {"inject": {"use": "hidrop/late-injection", "at": 2}}
    for kind, more, message in (
        (Unasked, {}, r"stages\.states: values of layer 1: let the stage's `reads_states` be true"),
        (Untapped, {}, r"stages\.states: states of layer 0: list the layer in `taps`"),
        (States, late, r"stages\.states: layer 1: ran before vision entered at boundary 2"),
    ):
        which = policy(**more, states={"use": kind})
        with pytest.raises(DecisionError, match=message), dropflow.attach(model, which):
            model(**inputs)


@torch.no_grad()
def test_nothing_is_kept_where_nobody_asks() -> None:
    from dropflow.engine.decoder.prompt_run import PromptRun

    runs: list[PromptRun] = []

    class Asks(Stage[Any]):
        taps = (1,)
        prune_at = (3,)

        @hookimpl
        def prune(self, call: PruneCall) -> None:
            assert call.tapped(1).value is None

    finish = PromptRun.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptRun, "finish", lambda self: (runs.append(self), finish(self)))
        model, inputs = tiny_llava(), prompt()
        with dropflow.attach(model, policy(asks={"use": Asks})):
            model(**inputs)
    assert [run._states for run in runs] == [{}]


@torch.no_grad()
def test_states_agree_with_the_next_layers_input_for_late_tokens() -> None:
    model, inputs = tiny_llava(), prompt()
    got: list[float] = []

    class Last(States):
        taps = (3,)
        prune_at = (4,)

        @hookimpl
        def prune(self, call: PruneCall) -> None:
            got.append(relative_error(call.states(3)[call.valid], call.hidden[call.valid]))

    late = {"use": "hidrop/late-injection", "at": 3}
    with dropflow.attach(model, policy(inject=late, states={"use": Last})):
        model(**inputs)
    assert got == [0.0]

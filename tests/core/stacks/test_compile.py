"""Compiled models follow whatever policy is attached, and what has nothing to do with it is not compiled anew."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from counted_graphs import Graphs, graphs
from seven import SEVEN, outcome
from tiny import policy, prompt, tiny_llava
from torch import Tensor
from training import Prompts, collate, freeze_tower

import dropflow

__all__ = ["graphs"]  # a fixture
INPUTS, MIXED = prompt([(3, "I", 5)]), prompt()
POLICIES: Mapping[str, Any] = {
    "hidrop": policy(
        inject={"use": "hidrop/late-injection", "at": 0.4}, pyramid={"use": "hidrop/concave-pyramid", "keep": {0.7: 7}}
    ),
    "fastv": policy(rank={"use": "fastv/attention-rank", "at": 1, "keep": 0.4}),
    "visionzip": SEVEN["visionzip"],
    "plain": None,
}


def in_place(model: Any, backend: Graphs) -> Any:
    model.compile(backend=backend)
    return model


def wrapped(model: Any, backend: Graphs) -> Any:
    return torch.compile(model, backend=backend)


def by_layer(model: Any, backend: Graphs) -> Any:
    for layer in (*model.get_decoder().layers, *model.model.vision_tower.encoder.layers):
        layer.compile(backend=backend, dynamic=True)
    return model


def by_part(model: Any, backend: Graphs) -> Any:
    core = model.model
    for part in (core.vision_tower, core.multi_modal_projector, core.language_model, model.lm_head):
        part.compile(backend=backend)
    return model


WAYS = {way.__name__: way for way in (in_place, wrapped, by_layer, by_part)}


@torch.no_grad()
def logits(model: Any, which: Any) -> Tensor:
    with nullcontext() if which is None else dropflow.attach(model, which):
        found: Tensor = model(**INPUTS).logits
    return found


def follows(model: Any, plain: Any, order: tuple[str, ...]) -> None:
    """Check a compiled model under policies, one after the other, against one that is not compiled."""
    for place, name in enumerate(order):
        which = POLICIES[name]
        assert torch.equal(logits(model, which), logits(plain, which)), f"{name}, after {order[:place]}"


def test_a_compiled_model_encodes_by_the_policy_that_is_attached(graphs: Graphs) -> None:
    model = in_place(tiny_llava(layers=1, tower_layers=2), graphs)
    follows(model, tiny_llava(layers=1, tower_layers=2), ("plain", "visionzip", "plain"))
    assert graphs.made > 10


def test_compiled_layers_run_under_every_policy_and_are_used_again(graphs: Graphs) -> None:
    model, plain = by_layer(tiny_llava(layers=3), graphs), tiny_llava(layers=3)
    follows(model, plain, ("plain", "hidrop", "visionzip"))
    made = graphs.made
    follows(model, plain, ("plain", "visionzip", "hidrop", "plain"))
    assert graphs.made == made > 0


def test_attaching_compiles_nothing_anew_that_has_nothing_to_do_with_it(graphs: Graphs) -> None:
    other, model = by_layer(tiny_llava(layers=2, seed=1), graphs), tiny_llava(layers=2)
    own = torch.compile(lambda x: (x * 2).relu().sum(), backend=graphs)
    numbers = torch.arange(-3.0, 4.0)
    before = logits(other, None), own(numbers)
    made = graphs.made
    assert made > 2
    with dropflow.attach(model, POLICIES["fastv"]):
        assert torch.equal(logits(other, None), before[0])
        model(**INPUTS)
        assert torch.equal(own(numbers), before[1])
    assert torch.equal(logits(other, None), before[0])
    assert torch.equal(own(numbers), before[1])
    assert graphs.made == made


ORDERS = [
    ("plain", "visionzip", "plain", "hidrop", "visionzip", "plain"),
    ("hidrop", "visionzip", "hidrop", "plain"),
    ("visionzip", "plain", "hidrop"),
]
"""Policies under which one compiled model runs, one after the other; each meets code compiled for another."""


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS, ids=["plain first", "hidrop first", "visionzip first"])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_answers_what_it_answers_uncompiled(graphs: Graphs, way: str, order: tuple[str, ...]) -> None:
    model, plain = WAYS[way](tiny_llava(layers=3), graphs), tiny_llava(layers=3)
    for place, name in enumerate(order):
        which = POLICIES[name]
        found, expected = outcome(model, which, MIXED), outcome(plain, which, MIXED)
        assert found.differences(expected) == [], f"{name}, after {order[:place]}"
    assert graphs.made > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_learns_what_it_learns_uncompiled(graphs: Graphs, way: str) -> None:
    batch = collate([Prompts()[number] for number in range(4)])
    steps = []
    for compiled in (True, False):
        model = freeze_tower(tiny_llava(layers=3)).train()
        run, found = WAYS[way](model, graphs) if compiled else model, []
        for name in ("plain", "hidrop", "visionzip", "plain"):
            which = POLICIES[name]
            with nullcontext() if which is None else dropflow.attach(run, which):
                loss = run(**batch).loss
                loss.backward()
            found.append((loss.item(), {key: w.grad for key, w in model.named_parameters() if w.grad is not None}))
            model.zero_grad()
        steps.append(found)
    for (loss, gradients), (expected_loss, expected) in zip(*steps, strict=True):
        assert loss == expected_loss
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[key], expected[key]) for key in expected)

"""Compiled decode steps under a set of policies: one graph for all, and for as few sizes as without a policy."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from compiled_answers import FASTV, HIDROP, TOKENS, asked, compiling, graphs, static
from counted_graphs import Graphs
from tiny import Parts, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import DynamicCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.attach.model_hooks import ModelHooks
from dropflow.engine.tokens import static_layers
from dropflow.errors import UnsupportedCall

__all__ = ["graphs"]  # a fixture
SET: dict[str, Any] = {
    "hidrop": HIDROP,
    "fastv": FASTV,
    "early": policy(rank={"use": "fastv/attention-rank", "at": 1, "keep": 9}),
    "twice": policy(
        first={"use": "fastv/attention-rank", "at": 1, "keep": 11}, then={"use": "fastv/attention-rank", "at": 2}
    ),
    "encode": policy(prune={"use": "divprune/max-min", "keep": 6}),
}
"""Policies under which other layers hold other tokens."""
COMPACT = {name: stages | {"positions": "compact"} for name, stages in SET.items()}
ONE: Parts = (3, "I", 5)
AGAIN = ("hidrop", "fastv", "early", "twice", "encode", "fastv", "hidrop")


@pytest.fixture
def model() -> Any:
    return tiny_llava(layers=3)


@pytest.mark.parametrize(
    ("policies", "stride", "made"),
    [(SET, 64, 1), (SET, 1, 2), pytest.param(COMPACT, 1, 2, marks=pytest.mark.slow)],
    ids=["one size", "sizes", "compact"],
)
@torch.no_grad()
def test_one_graph_serves_the_policies_of_a_set(
    model: Any, graphs: Graphs, policies: dict[str, Any], stride: int, made: int
) -> None:
    """As many graphs as sizes of caches need: that of the first one, and one for all others."""
    step, found = torch.compile(model, backend=graphs, fullgraph=True), {}
    with (
        mock.patch.object(static_layers, "STRIDE", stride),
        dropflow.attach_set(model, policies, default="hidrop") as flows,
    ):
        for name in AGAIN:
            with flows.using(name):
                found[name] = asked(model, static(model), step)
                assert relative_error(found[name], asked(model, DynamicCache())) < 1e-5
        assert graphs.made == made
    others = list(found.values())
    assert all(relative_error(one, other) > 1e-3 for one, other in pairwise(others))


@torch.no_grad()
def test_generate_compiles_one_graph_for_a_set(model: Any, graphs: Graphs) -> None:
    with dropflow.attach_set(model, SET | {"none": None}, default="fastv") as flows:
        for name in ("hidrop", "early", "hidrop", "twice", "none", "early", "none"):
            with flows.using(name) as flow:
                expected = model.generate(**prompt(), **TOKENS)
                told = None if flow is None else str(flow.report())
                assert torch.equal(model.generate(**prompt(), **compiling(graphs)), expected)
                assert flow is None or str(flow.report()) == told
        assert graphs.made == 3  # for the first sizes, for others, and for layers of transformers' own
        expected = model.generate(**prompt(), **TOKENS)
        assert torch.equal(model.generate(**prompt(), **compiling(graphs)), expected)
        assert graphs.made == 4  # the default, outside `using`


@torch.no_grad()
def test_a_cache_is_stepped_on_under_its_own_policy_alone(model: Any, graphs: Graphs) -> None:
    step, token = torch.compile(model, backend=graphs), torch.tensor([[5], [6], [7]])
    with dropflow.attach_set(model, SET | {"none": None}, default="hidrop") as flows:
        caches, expected = {}, {}
        for name in ("hidrop", "fastv"):
            with flows.using(name):
                caches[name], dynamic = static(model), DynamicCache()
                for cache in (caches[name], dynamic):
                    model(**prompt(), **{CACHE_ARGUMENT: cache})
                expected[name] = [model(input_ids=token, **{CACHE_ARGUMENT: dynamic}).logits for _ in range(4)]
        for name, cache in caches.items():
            with flows.using(name):
                found = step(input_ids=token, **{CACHE_ARGUMENT: cache}).logits
            assert relative_error(found, expected[name][0]) < 1e-5
        assert graphs.made == 2
        for number, wrong in enumerate(("hidrop", "none", None)):
            with (
                nullcontext() if wrong is None else flows.using(wrong),
                pytest.raises(UnsupportedCall, match="written under"),
            ):
                step(input_ids=token, **{CACHE_ARGUMENT: caches["fastv"]})
            never = mock.patch.object(ModelHooks, "_open", side_effect=AssertionError)
            with flows.using("fastv"), never:  # no hook runs for what is right, also after a refusal
                found = step(input_ids=token, **{CACHE_ARGUMENT: caches["fastv"]}).logits
            assert relative_error(found, expected["fastv"][number + 1]) < 1e-5
        with flows.using("hidrop"), never:
            found = step(input_ids=token, **{CACHE_ARGUMENT: caches["hidrop"]}).logits
        assert relative_error(found, expected["hidrop"][1]) < 1e-5


@torch.no_grad()
def test_threads_choose_their_own_policies(model: Any, graphs: Graphs) -> None:
    step, found = torch.compile(model, backend=graphs, fullgraph=True), dict[str, Tensor]()
    with dropflow.attach_set(model, SET, default="hidrop") as flows:
        with flows.using("early"):
            asked(model, static(model), step)

        def answer(name: str) -> None:
            with torch.no_grad(), flows.using(name):
                found[name] = asked(model, static(model), step)

        with flows.using("fastv"):  # of this thread alone
            thread = threading.Thread(target=answer, args=("twice",))
            thread.start()
            thread.join()
            answer("encode")
            found["fastv"] = asked(model, static(model), step)
        assert graphs.made == 2
        for name, logits in found.items():
            with flows.using(name):
                assert relative_error(logits, asked(model, DynamicCache())) < 1e-5
    assert found.keys() == {"twice", "encode", "fastv"}


ROOM = 20
AXES: dict[str, list[tuple[list[Parts], int]]] = {
    "batch": [([ONE] * batch, 64) for batch in (1, 2, 3, 4)],
    "images": [([(3, *["I"] * images, 5)], 8 + 16 * images + ROOM) for images in (1, 2, 3, 4)],
    "length": [([(3, "I", 5 + more)], 24 + more + ROOM) for more in (0, 3, 6, 9)],
    "limit": [([ONE], limit) for limit in (64, 80, 96, 128)],
}
"""Prompts, and sizes of their caches, that differ in one respect."""


@pytest.mark.parametrize(
    ("axis", "which"),
    [
        ("batch", HIDROP),
        # caches of other sizes need as many graphs in `test_one_graph_serves_the_policies_of_a_set`, too
        *(pytest.param(axis, HIDROP, marks=pytest.mark.slow) for axis in ("images", "length", "limit")),
        *(pytest.param(axis, COMPACT["fastv"], marks=pytest.mark.slow) for axis in AXES),
    ],
)
@torch.no_grad()
def test_sizes_need_as_many_graphs_as_without_a_policy(graphs: Graphs, axis: str, which: Any) -> None:
    model, made = tiny_llava(layers=3), []
    for attached in (None, which):
        torch.compiler.reset()
        graphs.made = 0
        step = torch.compile(model, backend=graphs, fullgraph=True)
        with nullcontext() if attached is None else dropflow.attach(model, attached):
            for samples, limit in AXES[axis]:
                inputs = prompt(samples)
                found = asked(model, static(model, limit), step, inputs, count=2)
                assert relative_error(found, asked(model, DynamicCache(), inputs=inputs, count=2)) < 1e-5
        made.append(graphs.made)
    assert made == [2, 2]

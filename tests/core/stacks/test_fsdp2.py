"""A model that FSDP2 shards over two ranks gives the answers, losses and gradients of one device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from seven import SEVEN, outcome
from tiny import KEEP_ALL, policy, prompt, relative_error, tiny_llava
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from training import Prompts, collate, freeze_tower

import dropflow
from dropflow.errors import UnsupportedCall

RANKS = 2
INPUTS = prompt()
ROWS = [Prompts()[number] for number in range(4)]
"""The batch of one step; each rank takes a half of it."""
ASKED = sum(label != -100 for row in ROWS for label in row["labels"])
MERGING = policy(merge={"use": "tome/token-merging", "r": 3, "layers": 2})
"""Runs layers of the vision tower in two halves."""
POLICIES: dict[str, Any] = {**SEVEN, "tome": MERGING, "plain": None}


def step(model: Any, which: Any, half: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a half of the batch, counted over all of it, and every gradient."""
    batch = collate(ROWS[2 * half : 2 * half + 2])
    model.train()
    with dropflow.attach(model, which or policy()):
        loss = model(**batch, num_items_in_batch=ASKED).loss
        loss.backward()
    gradients = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    model.eval().zero_grad()  # now: while a sharded model is gathered, this would not reach its shards
    return loss.detach(), gradients


def refusal_to_train_in_halves(model: Any) -> str:
    model.model.vision_tower.requires_grad_(True)
    try:
        step(model, MERGING, distributed.get_rank())
    except UnsupportedCall as error:
        return str(error)
    return ""


def sharded(**options: Any) -> Any:
    model, mesh = freeze_tower(tiny_llava()), init_device_mesh("cpu", (RANKS,))
    for part in (*model.model.vision_tower.encoder.layers, *model.get_decoder().layers, model):
        fully_shard(part, mesh=mesh, **options)
    return model


def work(folder: Path) -> None:
    """What each rank does, and writes down."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, rank = sharded(), distributed.get_rank()
    found: dict[str, Any] = {}
    for name, which in POLICIES.items():
        answers = outcome(model, which, INPUTS)
        loss, gradients = step(model, which, rank)
        # FSDP2 averages over the ranks; the whole gradient is on each of them then
        whole = {key: gradient.full_tensor() * RANKS for key, gradient in gradients.items()}
        found[name] = answers, loss, whole
    assert all(isinstance(layer, FSDPModule) for layer in model.get_decoder().layers)
    mixed = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found["mixed"] = [outcome(mixed, which, INPUTS) for which in (None, KEEP_ALL)]
    found["refusal"] = refusal_to_train_in_halves(model)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found, which run all policies one after the other."""
    folder = tmp_path_factory.mktemp("fsdp2")
    debug_launcher(work, (folder,), num_processes=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def one_device() -> Any:
    return freeze_tower(tiny_llava())


@pytest.mark.parametrize("which", POLICIES)
def test_every_rank_answers_what_one_device_does(ranks: list[dict[str, Any]], one_device: Any, which: str) -> None:
    expected = outcome(one_device, POLICIES[which], INPUTS)
    for rank in ranks:
        assert rank[which][0].differences(expected) == []


@pytest.mark.parametrize("which", POLICIES)
def test_losses_and_gradients_of_the_ranks_are_those_of_one_device(
    ranks: list[dict[str, Any]], one_device: Any, which: str
) -> None:
    halves = [step(one_device, POLICIES[which], half) for half in range(RANKS)]
    expected = added(halves[0][1], halves[1][1])
    assert len(expected) > 50
    for half, rank in enumerate(ranks):
        _, loss, gradients = rank[which]
        assert torch.equal(loss, halves[half][0])
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) < 1e-5, name


def added(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert one.keys() == two.keys()
    return {name: one[name] + two[name] for name in one}


def test_ranking_changes_nothing_where_parameters_are_gathered_in_bfloat16(ranks: list[dict[str, Any]]) -> None:
    for plain, ranked in (rank["mixed"] for rank in ranks):
        assert plain.logits.dtype == torch.bfloat16
        assert plain.differences(ranked) == ["live"]  # nothing was watched without a policy


def test_gradients_of_a_layer_that_runs_in_halves_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refusal"].startswith("FSDP2: a stage works inside a layer that trains, but a sharded layer")

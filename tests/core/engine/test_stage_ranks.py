"""A stage's module on two ranks, replicated and sharded, gets the gradients of one rank on the same batch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from tiny import policy, relative_error, tiny_llava
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import Prompts, collate, freeze_tower

import dropflow
from dropflow.errors import UnsupportedModel

DATA = Prompts()
HALVES = [collate([DATA[0], DATA[1]]), collate([DATA[2], DATA[3]])]
ASKED = sum(int((half["labels"] != -100).sum()) for half in HALVES)
POLICY = policy(
    selector={"use": "visionselector/scorer", "keep": 0.25},
    pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 8, 4: 4}, "learn": True, "budget": {"average_tokens": 6}},
)
PREFIX = "dropflow_stages."


def trained(model: Any) -> Any:
    """The model with the policy attached, in the middle of training, with a scorer that tells rows apart."""
    flow = dropflow.attach(model.train(), POLICY)
    flow.progress = 0.5
    dice = torch.Generator().manual_seed(0)
    for weight in flow.modules["selector"].parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=dice)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, weight in model.named_parameters():
        _, inside, own = name.partition(PREFIX)
        if inside and weight.grad is not None:
            found[own] = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad.clone()
    return found


def work(folder: Path) -> None:
    """What each rank does, and writes down; gradients are averaged over the ranks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank, found = distributed.get_rank(), {}
    own = HALVES[rank] | {"num_items_in_batch": ASKED / 2}
    replicated = DistributedDataParallel(trained(freeze_tower(tiny_llava())), find_unused_parameters=True)
    replicated(**own).loss.backward()
    found["replicated"] = gradients(replicated)
    model = trained(freeze_tower(tiny_llava()))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(**own).loss.backward()
    found["sharded"] = gradients(model)
    dropflow.detach(model)
    try:
        dropflow.attach(model, POLICY)
    except UnsupportedModel as error:
        found["refusal"] = str(error)
    if rank == 0:
        torch.save(found, folder / "found.pt")


@pytest.mark.slow
def test_gradients_are_those_of_one_rank(tmp_path: Path) -> None:
    debug_launcher(work, args=(tmp_path,), num_processes=2)
    found = torch.load(tmp_path / "found.pt")
    assert "attach the policy before `fully_shard`" in found["refusal"]
    model = trained(freeze_tower(tiny_llava()))
    for half in HALVES:
        model(**half, num_items_in_batch=ASKED).loss.backward()
    expected = gradients(model)
    assert len(expected) == 5
    for how in ("replicated", "sharded"):
        assert found[how].keys() == expected.keys()
        for name, gradient in expected.items():
            if gradient.abs().max() > 1e-6:  # the bias of the scorer's q adds the same to every score
                assert relative_error(found[how][name], gradient) < 1e-4, (how, name)

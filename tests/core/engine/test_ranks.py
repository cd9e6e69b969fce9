"""Training on two ranks, replicated and sharded, gives the losses of one rank on the same global batch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from tiny import HIDROP, tiny_llava
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import Prompts, collate, freeze_tower, trainer

import dropflow
from dropflow.errors import UnsupportedCall

DATA = Prompts()
STEPS = 4


def by_hand(model: Any, rank: int = 0, ranks: int = 1) -> list[float]:
    """Four steps of SGD over batches of four; each rank takes its share, and losses are over the global batch."""
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.05)
    losses = []
    for step in range(STEPS):
        rows = [DATA[i] for i in range(4 * (step % 2), 4 * (step % 2) + 4)]
        asked = sum(label != -100 for row in rows for label in row["labels"])
        own = collate(rows[rank * 4 // ranks : (rank + 1) * 4 // ranks])
        loss = model(**own, num_items_in_batch=asked / ranks).loss  # gradients are averaged over the ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / ranks
        if ranks > 1:
            distributed.all_reduce(total)
        losses.append(total.item())
    return losses


def sharded(parts: Callable[[Any], list[Any]]) -> list[float]:
    model = freeze_tower(tiny_llava()).train()
    mesh = init_device_mesh("cpu", (2,))
    for part in (*parts(model.get_decoder().layers), model):
        fully_shard(part, mesh=mesh)
    with dropflow.attach(model, HIDROP):
        return by_hand(model, distributed.get_rank(), 2)


def refusal_of_soft_selection() -> str:
    pyramid = HIDROP["stages"]["pyramid"] | {"select": "soft"}
    model = freeze_tower(tiny_llava()).train()
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.get_decoder().layers, model):
        fully_shard(part, mesh=mesh)
    with dropflow.attach(model, HIDROP | {"stages": HIDROP["stages"] | {"pyramid": pyramid}}):
        try:
            by_hand(model, distributed.get_rank(), 2)
        except UnsupportedCall as error:
            return str(error)
    return ""


def replicated() -> list[float]:
    model = torch.nn.parallel.DistributedDataParallel(freeze_tower(tiny_llava()).train())
    with dropflow.attach(model, HIDROP):
        return by_hand(model, distributed.get_rank(), 2)


def trained(folder: Path) -> list[float]:
    model = freeze_tower(tiny_llava())
    loop, losses = trainer(model, folder, per_device_train_batch_size=2, ddp_find_unused_parameters=False)
    with dropflow.attach(model, HIDROP):
        loop.train()
    assert isinstance(loop.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return losses.train


def work(folder: Path) -> None:
    """The work of each of the two processes; the first one records the losses."""
    warnings.simplefilter("ignore")
    AcceleratorState._reset_state(reset_partial_state=True)  # left by earlier tests of the parent process
    losses: dict[str, Any] = {"trainer": trained(folder)}
    losses["replicated"] = replicated()
    losses["sharded by layer"] = sharded(list)
    losses["sharded within layers"] = sharded(lambda layers: [part for x in layers for part in (x.self_attn, x)])
    losses["sharded as one"] = sharded(lambda _: [])
    losses["refusal"] = refusal_of_soft_selection()
    if distributed.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    debug_launcher(work, (folder,), num_processes=2)
    found: dict[str, Any] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.fixture(scope="module")
def one_rank() -> list[float]:
    model = freeze_tower(tiny_llava()).train()
    with dropflow.attach(model, HIDROP):
        return by_hand(model)


@pytest.mark.parametrize(
    "how", ["trainer", "replicated", "sharded by layer", "sharded within layers", "sharded as one"]
)
def test_two_ranks_give_the_losses_of_one(two_ranks: Any, one_rank: list[float], how: str) -> None:
    assert two_ranks[how] == pytest.approx(one_rank, rel=1e-5)
    assert len(set(one_rank)) == STEPS


def test_gradients_through_the_ranking_of_a_sharded_layer_are_refused(two_ranks: Any) -> None:
    assert two_ranks["refusal"].startswith("FSDP2: a stage asks for gradients through its ranking")

"""A model whose parameters FSDP2 divides among the processes, and its whole states for checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

import dropflow


def shard(model: Any, device: torch.device) -> None:
    """Divide the parameters of `model` among all processes, in place: the decoder layer by layer, then the rest."""
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    layers = dropflow.backbone_for(model).text._modules["layers"]
    for part in (*layers._modules.values(), model):
        fully_shard(part, mesh=mesh)
    whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if whole:
        raise RuntimeError(f"fully_shard left {len(whole)} parameters whole, such as {whole[0]}")


def is_sharded(model: Any) -> bool:
    """Whether `shard` divided this model."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by name, whole and on the CPU; tied ones once. Called by all processes."""
    names = {name for own in (model.named_parameters(), model.named_buffers()) for name, _ in own}
    return {name: _whole(value).cpu() for name, value in model.state_dict().items() if name in names}


def whole_state(optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state with whole tensors on the CPU. Called by all processes."""
    state: dict[str, Any] = optimizer.state_dict()
    tensors = {key: _mapped(own, lambda value: _whole(value).cpu()) for key, own in state["state"].items()}
    return state | {"state": tensors}


def load_whole_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore what `whole_state` returned. Called by all processes."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def divided(value: torch.Tensor, weight: DTensor) -> torch.Tensor:
        if value.shape != weight.shape or not value.dim():  # such as the number of steps
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)

    tensors = {
        key: _mapped(own, lambda value, weight=weights[int(key)]: divided(value, weight))
        for key, own in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": tensors})


def _mapped(state: dict[str, Any], change: Any) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()

"""Prepares layers sharded by FSDP2 to be run without the hooks that gather their parameters."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from dropflow.errors import UnsupportedCall


def gather_shards(layer: nn.Module, needs: str, *, with_gradient: bool) -> None:
    """Gather the parameters of a sharded layer, as its own hooks would; they stay gathered until its next run ends.

    Raises `UnsupportedCall` if gradients must flow back through this run. `needs` says what requires them.
    """
    if not isinstance(layer, FSDPModule):
        return
    if with_gradient:
        raise UnsupportedCall(
            f"FSDP2: {needs}, but a sharded layer frees its parameters before they are needed again; shard the model "
            "as one, use DistributedDataParallel, or do without these gradients"
        )
    layer.unshard()

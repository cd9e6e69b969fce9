"""Layers that FSDP2 shards, run past the hooks that would gather their parameters."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from dropflow.errors import UnsupportedCall


def gather_shards(layer: nn.Module, needs: str, *, with_gradient: bool) -> None:
    """Gather the parameters of a sharded layer, as its own hooks would; they stay until it has run next.

    Raises `UnsupportedCall` where gradients must come back this way. `needs` names what asks for them.
    """
    if not isinstance(layer, FSDPModule):
        return
    if with_gradient:
        raise UnsupportedCall(
            f"FSDP2: {needs}, but a sharded layer lets its parameters go before they are needed again; shard the model "
            "as one, use DistributedDataParallel, or do without these gradients"
        )
    layer.unshard()

"""The processes that train together, as torchrun or a launcher has started them."""

from __future__ import annotations

from os import environ

from torch import distributed


def meet() -> None:
    """Wait for the other processes; before the first stage they meet when the Trainer's arguments are made."""
    if distributed.is_initialized():
        distributed.barrier()


def processes() -> int:
    """Return how many train together."""
    return distributed.get_world_size() if distributed.is_initialized() else int(environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return (distributed.get_rank() if distributed.is_initialized() else int(environ.get("RANK", 0))) == 0

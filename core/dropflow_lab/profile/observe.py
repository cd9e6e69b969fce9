"""Watches one prefill through a stage that is called at every boundary and drops nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import dropflow
from dropflow import PruneCall, Stage, StageOptions, hookimpl
from dropflow.policy.policy import policy_from_dict


class WatchOptions(StageOptions):
    """The function to call at each boundary."""

    see: Callable[[PruneCall], None]


class Watch(Stage[WatchOptions]):
    """Calls a function with the live tokens before every layer in which vision is live."""

    Options = WatchOptions
    summary = "watches every boundary"

    @property
    def prune_at(self) -> tuple[int, ...]:
        """Every boundary at which vision is live."""
        return tuple(range(self.context.window.entry, self.context.window.exit))

    @hookimpl
    def prune(self, call: PruneCall) -> None:
        """Call the function and drop nothing."""
        self.options.see(call)


@contextmanager
def watching(model: Any, see: Callable[[PruneCall], None]) -> Iterator[None]:
    """Call `see` at every boundary 0..L-1 of each prefill inside the block."""
    policy = policy_from_dict({"name": "profile", "stages": {"watch": {"use": Watch, "see": see}}})
    with dropflow.attach(model, policy), torch.no_grad():
        yield


@dataclass(frozen=True)
class Groups:
    """The tokens (or slots) of a prompt by modality; newline tokens of a picture belong to none."""

    system: Bool[Tensor, "B T"]
    """Text before the first visual token."""
    visual: Bool[Tensor, "B T"]
    instruction: Bool[Tensor, "B T"]
    """Text after the last visual token."""

    @classmethod
    def of(cls, call: PruneCall) -> Groups:
        """Group the slots of a call by modality."""
        visual = call.image_id >= 0
        seen = visual.long().cumsum(1)
        return cls(call.text & (seen == 0), visual, call.text & (seen == seen[:, -1:]) & (seen > 0))


def visual_attention(call: PruneCall) -> Float[Tensor, "B H T"]:
    """Return the attention from the last token of each prompt to every slot, in the layer after the boundary."""
    return call.attention_rows(call.boundary, call.instruction_slots[:, -1:])[:, :, 0, -call.index.shape[1] :]

"""The attached model that a pass runs in, and the interface of a pass through its text decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dropflow.backbone.backbone import Backbone
from dropflow.backbone.mixers import windows_of
from dropflow.engine.decoder.record import CallRecord
from dropflow.engine.decoder.trained import Trained
from dropflow.engine.model.attention import HeadShards, QueryKey
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.model.stand_in import Run
from dropflow.lifecycle.lazy import lazy

if TYPE_CHECKING:
    from dropflow.lifecycle.stage import Stage
    from dropflow.policy.plan import Plan


@dataclass(frozen=True)
class Site:
    """An attached model and its plan."""

    plan: Plan
    backbone: Backbone
    shadows: Shadows
    """Temporary replacements in the model's objects."""
    shards: HeadShards | None = None
    """The ranks that share the heads of a tensor-parallel model."""
    trained: Trained = field(default_factory=Trained)
    """What the plan's stages train."""

    @property
    def training(self) -> bool:
        """Whether the model trains: it is in `train()` and gradients are enabled."""
        return torch.is_grad_enabled() and bool(self._text.training)

    @lazy
    def _text(self) -> Any:
        return self.backbone.text

    @property
    def implementation(self) -> str:
        """The text decoder's attention implementation, by its name in transformers."""
        name: str = self._text.config._attn_implementation
        return name

    def sharded(self, seen: QueryKey) -> QueryKey:
        """q and k of a decoder layer, marked with the ranks that share their heads."""
        if self.shards is None:
            return seen
        widths = self.backbone.decoder_widths
        return replace(seen, shards=self.shards, heads=widths.heads, kv_heads=widths.kv_heads)

    @property
    def flash(self) -> bool:
        """Whether the attention implementation takes two-dimensional masks."""
        return "flash" in self.implementation

    @property
    def windows(self) -> Mapping[int, int]:
        """Sliding windows, by layer, that the attention kernel enforces itself, by counting the entries that it gets.

        Kernels with four-dimensional masks leave windows to these.
        """
        return self._windows if self.flash else {}

    @lazy
    def _windows(self) -> Mapping[int, int]:
        return windows_of(self._text.config)

    @lazy
    def compact(self) -> bool:
        """Whether positions are renumbered after every drop."""
        return self.plan.policy.positions == "compact"

    @lazy
    def traceable(self) -> bool:
        """Whether a decode step on a static cache needs no more of the engine than a layer's mask and positions."""
        own = type(self.backbone).rotary is Backbone.rotary
        return (own or not self.compact) and not self.plan.hooks.watched("observe_cache")

    @lazy
    def cache_stages(self) -> tuple[Stage[Any], ...]:
        """The `decode_cache` stages, in policy order."""
        return tuple(stage for _, stage in self.plan.hooks.implementers("decode_cache"))


class DecoderRun(Run, Protocol):
    """State of one forward of the text decoder; lives from its pre-hook to its post-hook."""

    record: CallRecord | None

    @property
    def whole(self) -> bool:
        """Whether every token of the call is live after the last layer."""
        ...

    def finish(self) -> None:
        """Do what follows the last layer."""
        ...

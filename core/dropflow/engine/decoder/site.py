"""Where a pass through the text decoder takes place: the model, and what one call of it owns."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from dropflow.engine.decoder.layer_arguments import Context
from dropflow.engine.decoder.record import CallRecord
from dropflow.engine.model.attention import HeadShards, QueryKey
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.tokens.live_set import LiveSet

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.policy.plan import Plan


@dataclass(frozen=True)
class Site:
    """A model under a plan."""

    plan: Plan
    backbone: Backbone
    shadows: Shadows
    """For what is laid over the model's objects for a moment."""
    shards: HeadShards | None = None
    """The ranks that share the heads of a tensor-parallel model."""

    @functools.cached_property
    def implementation(self) -> str:
        """The text decoder's attention implementation, by its name in transformers."""
        name: str = self.backbone.text.config._attn_implementation
        return name

    def sharded(self, seen: QueryKey) -> QueryKey:
        """q and k of a decoder layer, with a note of whose heads they are."""
        if self.shards is None:
            return seen
        widths = self.backbone.decoder_widths
        return replace(seen, shards=self.shards, heads=widths.heads, kv_heads=widths.kv_heads)

    def context(self, embeds: Tensor) -> Context:
        """What is the same for all layers of a call whose tokens have these embeddings (batch, tokens, dim)."""
        compact = self.plan.policy.positions == "compact"
        return Context(
            flash="flash" in self.implementation,
            rotary=functools.partial(self.backbone.rotary, embeds) if compact else None,
            token_dims=self.backbone.token_arguments,
        )


class DecoderRun(Protocol):
    """State of one forward of the text decoder; lives from its pre-hook to its post-hook."""

    record: CallRecord | None

    @property
    def live(self) -> LiveSet:
        """Tokens of this call that are live after the last layer."""
        ...

    def layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run decoder layer `number`."""
        ...

    def finish(self) -> None:
        """What follows the last layer."""
        ...

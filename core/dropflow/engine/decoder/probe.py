"""Asks the coming layer for attention rows of the live tokens: its norm, q, k and RoPE, nothing behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dropflow.backbone.backbone import Projections
from dropflow.engine.model.attention import QueryKey, attend, row_attention
from dropflow.engine.model.tap import probe
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.masks import OWN_WAY, restrict_argument
from dropflow.errors import UnsupportedCall

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LayerProbe:
    """Attention rows of one layer before it runs; keys are computed once, queries by row.

    Where the backbone names the layer's projections, only what is read is projected: k of all live tokens, and q of
    the rows asked for. The layer's cache is read (`past`, keys of earlier turns) and never written.
    """

    def __init__(
        self,
        number: int,
        layer: nn.Module,
        hidden: Float[Tensor, "batch slots dim"],
        arguments: Callable[[], Arguments],
        *,
        implementation: str,
        projections: Projections | None,
        past: Tensor | None,
    ) -> None:
        self.number = number
        self._layer, self._hidden, self._make_arguments = layer, hidden, arguments
        self._implementation, self._projections, self._past = implementation, projections, past
        self._keys: QueryKey | None = None
        self._with_gradient = False

    @functools.cached_property
    def _arguments(self) -> Arguments:
        """Restricted to the live tokens only when a stage asks, since some rank by nothing of this layer."""
        return self._make_arguments()

    def rows(self, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows keys"]:
        """Attention probabilities of the query rows in the given slots, with gradients where they are enabled."""
        if self._keys is None or (torch.is_grad_enabled() and not self._with_gradient):
            self._keys, self._with_gradient = self._all_keys(), torch.is_grad_enabled()
        if self._projections is None:
            return row_attention(self._keys, rows)
        return attend(self._keys, self._query(rows, self._projections), rows)

    def _all_keys(self) -> QueryKey:
        unread = () if self._projections is None else (self._projections.query, self._projections.value)
        found = self._run_layer(self._hidden, self._arguments, unread)
        return found if self._past is None else replace(found, key=torch.cat((self._past, found.key), 2))

    def _query(self, rows: Tensor, projections: Projections) -> Tensor:
        hidden = self._hidden.gather(1, rows[:, :, None].expand(-1, -1, self._hidden.shape[2]))
        some = LiveSet(rows, None, self._hidden.shape[1])
        args, kwargs = self._arguments
        args = tuple(restrict_argument(value, some) for value in args)
        kwargs = {key: value if key in OWN_WAY else restrict_argument(value, some) for key, value in kwargs.items()}
        return self._run_layer(hidden, (args, kwargs), (projections.key, projections.value)).query

    def _run_layer(self, hidden: Tensor, arguments: Arguments, unread: tuple[nn.Module, ...]) -> QueryKey:
        args, kwargs = with_hidden(hidden, arguments[0], arguments[1] | {"past_key_values": None, "use_cache": False})
        _gather_shards(self._layer)
        with _ranking(self._layer), _unread(unread):
            # `forward`, so that neither a compiled graph nor anybody's hooks take this for the layer's real call
            return probe(self._implementation, lambda: self._layer.forward(*args, **kwargs))


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a layer."""
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden


def with_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a layer with other hidden states."""
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


@contextmanager
def _unread(projections: tuple[Any, ...]) -> Iterator[None]:
    """Let projections whose result nobody reads give zeros without a matrix product."""
    for projection in projections:
        width = projection.out_features
        projection.forward = lambda x, width=width: x.new_zeros(()).expand(*x.shape[:-1], width)
    try:
        yield
    finally:
        for projection in projections:
            del projection.forward


def _gather_shards(layer: nn.Module) -> None:
    """Gather the parameters of a layer that FSDP2 shards, as its own hooks would; they stay until it has run next."""
    if not isinstance(layer, FSDPModule):
        return
    if torch.is_grad_enabled():
        raise UnsupportedCall(
            "FSDP2: a stage asks for gradients through its ranking, but a sharded layer lets its parameters go before "
            "they are needed again; shard the model as one, use DistributedDataParallel, or select without gradients"
        )
    layer.unshard()


@contextmanager
def _ranking(layer: nn.Module) -> Iterator[None]:
    """Rank as at inference: no dropout (such as LoRA's) in q and k, and no layer that checkpoints itself."""
    training = [module for module in layer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

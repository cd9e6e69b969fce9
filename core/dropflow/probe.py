"""Asks the coming layer for attention rows of the live tokens: its norm, q, k and RoPE, nothing behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dropflow.attention import QueryKey, attend, row_attention
from dropflow.tap import probe

if TYPE_CHECKING:
    from dropflow.run import Run

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LayerProbe:
    """Attention rows of layer `number` in front of which a run stands; keys are computed once, queries by row.

    Where the backbone names the layer's projections, only what is read is projected: k of all live tokens, and q of
    the rows asked for. The layer's cache is read (keys of earlier turns) and never written.
    """

    def __init__(self, run: Run, number: int, layer: nn.Module, hidden: Tensor, arguments: Arguments) -> None:
        self._run, self._number, self._layer, self._hidden = run, number, layer, hidden
        self._arguments = run.restricted(*arguments, run.keys(number))
        self._projections = run.backbone.projections(layer)
        self._keys: QueryKey | None = None

    def rows(self, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows keys"]:
        """Attention probabilities of the query rows in the given slots."""
        if self._keys is None:
            self._keys = self._all_keys()
        if self._projections is None:
            return row_attention(self._keys, rows)
        return attend(self._keys, self._query(rows), rows)

    def _all_keys(self) -> QueryKey:
        unread = () if self._projections is None else (self._projections.query, self._projections.value)
        found = self._run_layer(self._hidden, self._arguments, unread)
        held = self._run.held(self._number)
        if held is not None and held.length:
            found = replace(found, key=torch.cat((held.keys, found.key), 2))
        return found

    def _query(self, rows: Tensor) -> Tensor:
        assert self._projections is not None
        hidden = self._hidden.gather(1, rows[:, :, None].expand(-1, -1, self._hidden.shape[2]))
        arguments = self._run.rows_of(*self._arguments, rows)
        return self._run_layer(hidden, arguments, (self._projections.key, self._projections.value)).query

    def _run_layer(self, hidden: Tensor, arguments: Arguments, unread: tuple[nn.Module, ...]) -> QueryKey:
        args, kwargs = with_hidden(hidden, arguments[0], arguments[1] | {"past_key_values": None, "use_cache": False})
        with torch.no_grad(), _without_checkpointing(self._layer), _unread(unread):
            # `forward`, so that neither a compiled graph nor anybody's hooks take this for the layer's real call
            return probe(self._run.implementation, lambda: self._layer.forward(*args, **kwargs))


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


@contextmanager
def _without_checkpointing(layer: nn.Module) -> Iterator[None]:
    """Layers of transformers checkpoint themselves while `training` is set; their children keep their own flag."""
    training, layer.training = layer.training, False
    try:
        yield
    finally:
        layer.training = training

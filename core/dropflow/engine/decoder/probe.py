"""Computes attention rows of the live tokens in the next layer, running only its norm, projections and RoPE."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dropflow.backbone.backbone import Projections
from dropflow.engine.model.arguments import Arguments, cache_in, parameters_of, with_hidden
from dropflow.engine.model.attention import QueryKey, attend, row_attention
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.model.sharded import gather_shards
from dropflow.engine.model.tap import probe
from dropflow.engine.tokens.live_set import LiveSet, picked
from dropflow.engine.tokens.restricting import TOKEN_DIMS, restrict
from dropflow.lifecycle.lazy import lazy

_LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.")
"""Libraries whose hooks are part of what a module computes; other hooks only observe and are skipped in ranking."""


class LayerProbe:
    """Attention rows of one layer before it runs; keys are computed once, queries per row.

    Where the backbone names the layer's projections, only what is read is projected: k of all live tokens and q of the
    requested rows. The layer's cache is read (`past`, keys of earlier turns) and never written.
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
        sharded: Callable[[QueryKey], QueryKey],
        shadows: Shadows,
    ) -> None:
        """`sharded` records on q and k which heads they belong to, where ranks share the heads."""
        self.number = number
        self._layer, self._hidden, self._make_arguments = layer, hidden, arguments
        self._implementation, self._projections, self._past = implementation, projections, past
        self._sharded, self._shadows = sharded, shadows
        self._keys: QueryKey | None = None
        self._with_gradient = False
        self._slots = hidden.shape[-2]

    @lazy
    def _arguments(self) -> Arguments:
        """The layer's arguments, restricted on first use because some stages read nothing of this layer."""
        return self._make_arguments()

    def rows(self, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows keys"]:
        """Attention probabilities of the query rows in the given slots, with gradients where they are enabled."""
        rows, graded = rows.to(self._hidden.device), torch.is_grad_enabled()
        query: Tensor | None = None
        if self._keys is None or (graded and not self._with_gradient):
            # several asked rows may be one, which a gradient would count twice
            first = (
                None if self._projections is None or graded else _SomeRows(self._projections.query, rows, self._slots)
            )
            self._keys, self._with_gradient = self._all_keys(first), graded
            query = (
                None
                if first is None or not first.projected
                else picked(self._keys.query, rows.to(self._keys.query.device))
            )
        if self._projections is None:
            return row_attention(self._keys, rows)
        return attend(self._keys, self._query(rows, self._projections) if query is None else query, rows)

    def _all_keys(self, first: _SomeRows | None) -> QueryKey:
        """k of all live tokens; q holds the rows that `first` projects, and nothing of use in others."""
        forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        if self._projections is not None:
            forwards = _zeros_of(self._projections.query, self._projections.value)
            forwards |= {} if first is None else {self._projections.query: first}
        found = replace(self._sharded(self._run_layer(self._hidden, self._arguments, forwards)), value=None)
        if self._past is None:
            return found
        return replace(found, key=torch.cat((self._past.to(found.key.device), found.key), 2))

    def _query(self, rows: Tensor, projections: Projections) -> Tensor:
        index = rows[:, :, None].expand(*self._hidden.shape[:-2], rows.shape[1], self._hidden.shape[-1])
        hidden = self._hidden.gather(-2, index)
        some, known = LiveSet(rows, None, self._slots), TOKEN_DIMS
        args, kwargs = self._arguments
        names = parameters_of(self._layer)
        args = (*args[:1], *(_some(name, value, some) for name, value in zip(names[1:], args[1:], strict=False)))
        kwargs = {name: _some(name, value, some) if name in known else value for name, value in kwargs.items()}
        return self._run_layer(hidden, (args, kwargs), _zeros_of(projections.key, projections.value)).query

    def _run_layer(
        self, hidden: Tensor, arguments: Arguments, forwards: Mapping[nn.Module, Callable[..., Tensor]]
    ) -> QueryKey:
        args, kwargs = with_hidden(hidden, *arguments)
        cache, _ = cache_in(kwargs)
        without: dict[str, Any] = {} if cache is None else {cache: None}
        if "use_cache" in kwargs:
            without["use_cache"] = False
        kwargs = kwargs | without
        gather_shards(
            self._layer, "a stage asks for gradients through its ranking", with_gradient=torch.is_grad_enabled()
        )
        with _ranking(self._layer, self._shadows), _projecting(forwards, self._shadows):
            # call `forward` directly, so that neither a compiled graph nor a hook treats this as the layer's real call
            return probe(self._implementation, lambda: self._layer.forward(*args, **kwargs))


class _SomeRows:
    """Forward of a projection that projects a few rows of each sample; others are zero."""

    def __init__(self, projection: nn.Module, rows: Int[Tensor, "batch rows"], slots: int) -> None:
        """`slots` are the rows that each sample has."""
        self._projection, self._rows, self._zeros = projection.forward, rows, _zeros_of(projection)[projection]
        self._shape = len(rows), slots
        self.projected = False
        """Whether the rows were projected, as they are where what arrives are the states of samples, token by token."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(hidden) is not Tensor or hidden.shape[:-1] != self._shape:
            return self._zeros(hidden)
        rows = self._rows[:, :, None].to(hidden.device)
        found: Tensor = self._projection(hidden.gather(1, rows.expand(-1, -1, hidden.shape[2])), *args, **kwargs)
        self.projected = True
        whole = found.new_zeros(*hidden.shape[:2], found.shape[2])
        return whole.scatter_(1, rows.expand_as(found), found)


def _some(name: str, value: Any, live: LiveSet) -> Any:
    return restrict(name, value, live, {}) if name in TOKEN_DIMS else value


@contextmanager
def _projecting(forwards: Mapping[nn.Module, Callable[..., Tensor]], shadows: Shadows) -> Iterator[None]:
    """Run other forwards for some projections."""
    with ExitStack() as laid:
        for projection, forward in forwards.items():
            laid.enter_context(shadows.over_forward(projection, forward))
        yield


def _zeros_of(*projections: Any) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forwards of projections whose results are not read, which return zeros without a matrix product."""
    return {projection: _zeros_of_width(projection.out_features) for projection in projections}


def _zeros_of_width(width: int) -> Callable[..., Tensor]:
    # a row rather than one number, because complex RoPE (`view_as_complex`) needs the last stride to be 1
    return lambda hidden, *_, **__: hidden.new_zeros(width).expand(*hidden.shape[:-1], width)


@contextmanager
def _ranking(layer: nn.Module, shadows: Shadows) -> Iterator[None]:
    """Rank as in inference: no dropout (such as LoRA's) in q and k, no checkpointing, and only hooks that compute.

    Only dropout is switched to inference mode, because quantised modules repack their weights when their mode changes.
    """
    with ExitStack() as laid:
        if layer.training:
            laid.enter_context(shadows.over(layer.__dict__, "gradient_checkpointing", False))
        for module in layer.modules():
            if module.training and isinstance(module, nn.modules.dropout._DropoutNd):
                laid.enter_context(shadows.over(module.__dict__, "training", False))
            for hooks in ("_forward_pre_hooks", "_forward_hooks"):
                own = module.__dict__[hooks]
                kept = OrderedDict((key, hook) for key, hook in own.items() if _computes(hook))
                if len(kept) < len(own):
                    laid.enter_context(shadows.over(module.__dict__, hooks, kept))
        yield


def _computes(hook: Any) -> bool:
    """Whether a hook belongs to a library that computes in hooks, such as FSDP."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith(_LIBRARIES)

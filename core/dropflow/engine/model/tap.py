"""Reads q, k and v of an attention layer as it runs, with any attention implementation, without changing the model.

Every attention layer of transformers 5 looks up its kernel in `ALL_ATTENTION_FUNCTIONS`. While a tap is open, the entry
in use is shadowed by a dispatcher that passes q and k to the tap of the *current thread* and then delegates to the
kernel, with other keys, values and mask if the tap returns some; calls from other threads and of other models pass
straight through.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dropflow.engine.model.attention import QueryKey
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.model.turns import Turn, Turns
from dropflow.lifecycle.spans import TAP, span

Seen = Callable[[QueryKey], "QueryKey | None"]
T = TypeVar("T")


class Probed(BaseException):
    """Ends a layer's forward once its q and k were read; never leaves `probe`.

    Not an `Exception`, so that error handling in model code does not swallow it.
    """


_here: ContextVar[Turn | None] = ContextVar("dropflow_tap", default=None)
"""The tap of this thread: a turn whose `call` receives q and k. A tap left open by an interrupt counts as closed."""
_table = Turns()
"""Turns to edit the table of attention functions, which all models share."""


def tapped(implementation: str, seen: Seen, call: Callable[[], T]) -> T:
    """Return `call()`, passing q and k of every attention that runs in it, in this thread, to `seen`.

    Where `seen` returns something else than `None`, the kernel attends to the keys, values and mask of that instead.
    `implementation` is the model's attention implementation (`config._attn_implementation`).
    """
    with span(TAP):
        tap = Turn(sys._getframe(), depths=[])
        tap.call = seen
        _dispatcher(implementation, tap)
        token = _here.set(tap)
    try:
        return call()
    finally:
        with span(TAP):
            tap.end()
            _here.reset(token)
            sweep()


@contextmanager
def untapped() -> Iterator[None]:
    """Hide from this thread's tap what runs inside the block, such as another model that a stage calls."""
    token = _here.set(None)
    try:
        yield
    finally:
        _here.reset(token)


def probe(implementation: str, layer: Callable[[], Any]) -> QueryKey:
    """Run `layer()` up to its first attention and return q and k; nothing after that point is executed."""
    found: list[QueryKey] = []

    def stop(layer_qk: QueryKey) -> NoReturn:
        found.append(layer_qk)
        raise Probed

    try:
        tapped(implementation, stop, layer)
    except Probed:
        return found[0]
    raise RuntimeError("the layer ran without looking up its attention in ALL_ATTENTION_FUNCTIONS")


def uncompiled(layer: nn.Module) -> Callable[..., Any]:
    """The layer's call with its hooks but without `layer.compile()`, whose graphs do not look up attention again."""
    call: Callable[..., Any] = layer._call_impl
    return call


def sweep() -> None:
    """Remove every dispatcher that no open tap needs, such as those left by an interrupt."""
    turn = _table.take(sys._getframe())
    for implementation, dispatcher in list(_dispatchers.items()):
        dispatcher.taps = [tap for tap in dispatcher.taps if not tap.over]
        if not dispatcher.taps:
            dispatcher.shadows.lift_all()
            del _dispatchers[implementation]
    turn.end()


def _dispatcher(implementation: str, tap: Turn) -> None:
    """Put a dispatcher in the table unless there is one, and register `tap` with it."""
    turn = _table.take(sys._getframe())
    standing = ALL_ATTENTION_FUNCTIONS.get(implementation)
    dispatcher = standing if isinstance(standing, _Dispatcher) else _Dispatcher(standing)
    dispatcher.taps.append(tap)
    _dispatchers[implementation] = dispatcher
    if dispatcher is not standing:
        # only this table's local entries, which take precedence over those registered globally
        dispatcher.shadows.lay(vars(ALL_ATTENTION_FUNCTIONS)["_local_mapping"], implementation, dispatcher)
    turn.end()


class _Dispatcher:
    """Passes q and k to the current thread's tap, then runs what the model would have run, or what the tap returns."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self.shadows = Shadows()
        self.taps: list[Turn] = []

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        tap = _here.get()
        if tap is not None and tap.mine:
            with span(TAP):
                instead = tap.call(_query_key(module, query, key, value, attention_mask, kwargs))
            if instead is not None:
                key, value, attention_mask = instead.key, instead.value, instead.mask
        if self._original is not None:
            return self._original(module, query, key, value, attention_mask, **kwargs)
        # "eager" has no entry: each modeling file brings its own function
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, **kwargs)


_dispatchers: dict[str, _Dispatcher] = {}
"""Attention implementation -> the dispatcher that replaces it."""


def _query_key(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> QueryKey:
    causal = kwargs.get("is_causal")
    return QueryKey(
        query,
        key,
        mask,
        scaling=kwargs.get("scaling") or query.shape[-1] ** -0.5,
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        softcap=kwargs.get("softcap"),
        sliding_window=kwargs.get("sliding_window") if mask is None or mask.dim() == 2 else None,
        borders=kwargs.get("cu_seq_lens_q"),
        value=value,
    )

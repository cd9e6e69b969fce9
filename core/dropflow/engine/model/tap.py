"""Sees q and k of one attention layer as it runs, by any attention implementation, without changing the model.

Every attention of transformers 5 looks its kernel up in `ALL_ATTENTION_FUNCTIONS`. While a tap is open, the entry in
use is overridden by a dispatcher that shows q and k to the tap of the *current thread* and then delegates; other
threads and other models pass straight through it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dropflow.engine.model.attention import QueryKey

Seen = Callable[[QueryKey], None]


class Probed(BaseException):
    """Ends a layer's forward once its q and k were seen; never leaves `probe`. (No `Exception`, so that no model code
    that handles errors swallows it.)"""


_tap: ContextVar[Seen | None] = ContextVar("dropflow_tap", default=None)
_lock = threading.Lock()
_open: dict[str, int] = {}
_absent = object()


@contextmanager
def tap(implementation: str, seen: Seen) -> Iterator[None]:
    """Call `seen` with q and k of every attention that runs inside the block, in this thread.

    `implementation` is the model's attention implementation (`config._attn_implementation`).
    """
    _install(implementation)
    token = _tap.set(seen)
    try:
        yield
    finally:
        _tap.reset(token)
        _remove(implementation)


def probe(implementation: str, layer: Callable[[], Any]) -> QueryKey:
    """Run `layer()` up to its first attention and return q and k; nothing behind that point is executed."""
    found: list[QueryKey] = []

    def stop(layer_qk: QueryKey) -> None:
        found.append(layer_qk)
        raise Probed

    with tap(implementation, stop):
        try:
            layer()
        except Probed:
            return found[0]
    raise RuntimeError("the layer ran without looking its attention up in ALL_ATTENTION_FUNCTIONS")


def uncompiled(layer: nn.Module) -> Callable[..., Any]:
    """The layer's call with its hooks but without `layer.compile()`, whose graphs have no attention left to look up."""
    call: Callable[..., Any] = layer._call_impl
    return call


def _install(implementation: str) -> None:
    with _lock:
        _open[implementation] = _open.get(implementation, 0) + 1
        if _open[implementation] == 1:
            original = ALL_ATTENTION_FUNCTIONS.get(implementation, _absent)
            ALL_ATTENTION_FUNCTIONS[implementation] = _Dispatcher(original)


def _remove(implementation: str) -> None:
    with _lock:
        _open[implementation] -= 1
        if _open[implementation] == 0:
            dispatcher = ALL_ATTENTION_FUNCTIONS[implementation]
            del ALL_ATTENTION_FUNCTIONS[implementation]
            # the entry may have been a local override of somebody else's, which ours replaced
            if ALL_ATTENTION_FUNCTIONS.get(implementation, _absent) is not dispatcher.original is not _absent:
                ALL_ATTENTION_FUNCTIONS[implementation] = dispatcher.original


class _Dispatcher:
    """Shows q and k to the current thread's tap, then runs what the model would have run."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        seen = _tap.get()
        if seen is not None:
            causal = kwargs.get("is_causal")
            seen(
                QueryKey(
                    query,
                    key,
                    attention_mask,
                    scaling=kwargs.get("scaling") or query.shape[-1] ** -0.5,
                    causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
                    softcap=kwargs.get("softcap"),
                    sliding_window=kwargs.get("sliding_window")
                    if attention_mask is None or attention_mask.dim() == 2
                    else None,
                )
            )
        if self.original is not _absent:
            return self.original(module, query, key, value, attention_mask, **kwargs)
        # "eager" has no entry: each modeling file brings its own function
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, **kwargs)

"""Room to grow: keys or values of a cache layer that are appended to without copying all of them at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dropflow.backbone.compiling import is_traced

LEAST = 64
"""Smallest number of further entries for which room is made."""
SMALL = 1 << 17
"""Bytes of keys below which copying all of them takes no longer than writing after them."""


class Room:
    """The tensor that holds the keys, or the values, of one cache layer, with room for more after them.

    What was there before may belong to others and is never written to: the first append after anything else has
    replaced the entries is an ordinary copy of their exact size. The second in a row copies them into a tensor with
    room, and those that follow write in place, where no view handed out earlier looks. For tensors that are not plain,
    every append is an ordinary copy.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        """What the last append returned; whoever replaces the entries by others ends the right to write after them."""
        self._whole: Tensor | None = None
        """The tensor with room, of which `_last` is a view; `None` before there is one."""
        self._entries = 0
        """Number of entries of `_whole` that `_last` shows."""

    def appended(
        self, held: Float[Tensor, "batch heads entries dim"], new: Float[Tensor, "batch heads more dim"]
    ) -> Float[Tensor, "batch heads entries+more dim"]:
        """The entries `held`, followed by `new`; raises torch's own error if they do not fit together."""
        if held is not self._last or not _alike(held, new):
            self._whole, self._last = None, torch.cat([held, new], dim=-2)
            return self._last
        before, more, whole = held.shape[-2], new.shape[-2], self._whole
        entries = before + more
        if whole is not None and (whole.data_ptr() != held.data_ptr() or before != self._entries):
            whole = None  # the same tensor object was given other contents (`.data`)
        frozen = whole is not None and whole.is_inference() and not torch.is_inference_mode_enabled()
        if whole is None or whole.shape[-2] < entries or frozen:
            whole = held.new_empty((*held.shape[:-2], entries + max(LEAST, entries // 8), held.shape[-1]))
            whole.narrow(-2, 0, before).copy_(held)
        whole.narrow(-2, before, more).copy_(new)
        self._whole, self._entries, self._last = whole, entries, whole.narrow(-2, 0, entries)
        return self._last


class Growing:
    """The part of a cache layer that appends entries; the only code of the engine that compiled layers run inside.

    While gradients are enabled, in compiled code and where the entries are `SMALL`, every append is an ordinary copy.
    """

    keys: Tensor
    values: Tensor
    is_initialized: bool
    rooms: tuple[Room, Room]
    """Room for keys and for values."""
    ahead: Any
    """The prefix that must come before anything is appended (`Ahead`); `None` for none."""
    _check_served: Callable[[], None]
    """Raises `UnsupportedCall` outside a call that serves the layer."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device of the first entries, as transformers' layers do."""
        super().lazy_initialization(key_states, value_states)  # type: ignore[misc]  # of the layer it is mixed into

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Append entries; returns the keys and values of all that are held.

        Raises `UnsupportedCall` where a prefix still waits, as in a call outside an attached model whose mask was made
        before it.
        """
        if self.ahead is not None:
            self._check_served()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if is_traced() or torch.is_grad_enabled() or self.keys.nbytes < SMALL:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        else:
            keys, values = self.rooms
            self.keys, self.values = keys.appended(self.keys, key_states), values.appended(self.values, value_states)
        return self.keys, self.values


def _alike(held: Tensor, new: Tensor) -> bool:
    """Whether both are plain tensors that only differ in their number of entries."""
    return (
        type(held) is type(new) is Tensor
        and held.dtype == new.dtype
        and held.device == new.device
        and held.shape[:-2] == new.shape[:-2]
        and held.shape[-1] == new.shape[-1]
    )

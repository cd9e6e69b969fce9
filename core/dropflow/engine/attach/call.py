"""One forward of an attached model, from its first hook to its last."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class Call:
    """What earlier hooks of one forward leave for later ones."""

    owner: object
    """The module whose hooks opened this call and will close it."""
    thread: int
    labels: Tensor | None = None
    logits_to_keep: int = 0
    attention_mask: Tensor | None = None
    visual: Tensor | None = None
    """Visual tokens (batch, tokens) boolean, if this call brings images."""
    modalities: Mapping[str, Tensor] = field(default_factory=dict)
    """The same by modality, where the prompt tells."""
    flags: dict[str, Tensor] = field(default_factory=dict)
    """Modality -> flags of the visual rows, in placeholder order (see `image_layout.py`)."""
    loss: Mapping[str, Any] | None = None
    """Arguments of the loss, if it is computed behind the model on live positions."""
    live_rows: Tensor | None = None
    """Row of the head's input that each position (batch, tokens) reads, where it runs on live positions only."""


class CallLock:
    """Lets one thread at a time run the forward of one attached model; forwards of others wait.

    The steps of a `generate` take turns with those of another thread: all that outlives a forward is in its own cache.
    A call that ended by an exception no hook saw (a keyboard interrupt) is taken over by the next one of its thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.call: Call | None = None

    def open(self, owner: object) -> Call:
        """Begin a call, waiting for another thread's to end."""
        thread = threading.get_ident()
        if self.call is None or self.call.thread != thread:
            self._lock.acquire()
        self.call = Call(owner, thread)
        return self.call

    def mine(self) -> Call | None:
        """This thread's open call."""
        call = self.call
        return call if call is not None and call.thread == threading.get_ident() else None

    def close(self) -> None:
        """End this thread's call, if it has one."""
        if self.mine() is not None:
            self.call = None
            self._lock.release()

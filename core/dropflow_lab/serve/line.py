"""The requests that wait for the model, and how batches are formed of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dropflow_lab.serve.waiting import Waiting


class Line:
    """Requests in the order of their arrival; may be used from several threads.

    The oldest request is always in the next batch, with the oldest others of its kind (`Waiting.kind`): batches never
    mix policies, and no policy can keep another one waiting for more than the batches before it.
    """

    def __init__(self, most: int, seconds: float) -> None:
        """`most` bounds a batch. Its oldest request waits up to `seconds` for others that are being prepared."""
        self._most, self._seconds = most, seconds
        self._waiting: list[Waiting] = []
        self._expected = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """A request is being prepared in this block, at whose end it is put in line or fails."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify_all()

    def put(self, request: Waiting) -> bool:
        """Put a request in line; false if the line is closed."""
        with self._changed:
            if not self._closed:
                self._waiting.append(request)
                self._changed.notify_all()
            return not self._closed

    def close(self) -> None:
        """Let nobody in any more; those who wait are still answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> list[Waiting] | None:
        """Return the next batch, waiting for one; `None` when the line is closed and empty."""
        with self._changed:
            while True:
                self._waiting = [request for request in self._waiting if not request.cancelled]
                if not self._waiting:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                batch = [request for request in self._waiting if request.kind == first.kind][: self._most]
                left = first.arrived + self._seconds - time.monotonic()
                if len(batch) < self._most and self._expected and left > 0:
                    self._changed.wait(left)
                    continue
                self._waiting = [request for request in self._waiting if request not in batch]
                return batch

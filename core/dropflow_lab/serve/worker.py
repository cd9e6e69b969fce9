"""The thread that runs the model: batch after batch from the line, until the line is closed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from dropflow.errors import DropflowError
from dropflow_lab.serve.api_error import ApiError, internal_error, stopping
from dropflow_lab.serve.line import Line
from dropflow_lab.serve.waiting import Waiting

_log = logging.getLogger("dropflow.serve")


class Answers(Protocol):
    """Answers batches."""

    def answer(self, batch: Sequence[Waiting]) -> None:
        """Answer requests of one kind, telling each of them its tokens and its end; raises what the model raises."""


class Worker(threading.Thread):
    """Answers the requests in a line.

    If the model fails on a batch before any of its requests has been told anything, every request is answered alone, so
    that a request that fails does not make others fail.
    """

    def __init__(self, line: Line, answers: Answers, noted: Callable[[Sequence[Waiting]], None]) -> None:
        """`noted` is called with every batch before it is answered."""
        super().__init__(name="dropflow-model", daemon=True)
        self._line, self._answers, self._noted = line, answers, noted
        self.failure: BaseException | None = None
        """What ended this thread before the line was closed."""

    def run(self) -> None:
        """Answer batches until the line is closed and empty."""
        try:
            while (batch := self._line.take()) is not None:
                self._noted(batch)
                self._answer(batch)
        except BaseException as error:  # noqa: BLE001  # raised again where the server ends
            _log.critical("the model's thread has ended", exc_info=True)
            self.failure = error
        finally:  # even if this thread fails, nobody waits for ever
            self._line.close()
            while rest := self._line.take():
                for request in rest:
                    request.tell(stopping())

    def _answer(self, batch: list[Waiting]) -> None:
        try:
            self._answers.answer(batch)
        except Exception as error:  # noqa: BLE001  # whatever a model or a stage raises ends these requests, not the server
            if len(batch) > 1 and not any(request.begun for request in batch):
                for request in batch:
                    self._answer([request])
                return
            _log.exception("the model failed on a batch of %d under the policy %s", len(batch), batch[0].policy)
            for request in batch:
                request.tell(_failure(error))


def _failure(error: Exception) -> ApiError:
    """What a client is told: the engine's refusals are about its request, everything else is the server's fault."""
    if isinstance(error, DropflowError):
        return ApiError(400, "refused", str(error), "messages")
    return internal_error()

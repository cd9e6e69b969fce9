"""The model's thread: one bad request in a batch fails alone, and nobody waits for ever."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch

from dropflow.errors import UnsupportedCall
from dropflow_lab.serve.api_error import ApiError
from dropflow_lab.serve.line import Line
from dropflow_lab.serve.prompt import Prompt
from dropflow_lab.serve.waiting import Choice, Finished, Piece, Told, Waiting
from dropflow_lab.serve.worker import Worker


class Model:
    """Answers with the policy's name, but for prompts of 13 tokens."""

    def __init__(self, error: BaseException, begins: bool = False) -> None:
        self.error, self.begins, self.batches = error, begins, list[int]()

    def answer(self, batch: Sequence[Waiting]) -> None:
        self.batches.append(len(batch))
        bad = any(request.prompt.tokens == 13 for request in batch)
        for request in batch:
            if not bad or self.begins:
                request.tell(Piece("x"))
        if bad:
            raise self.error
        for request in batch:
            request.tell(Finished("stop", 1))


def run(model: Model, sizes: Sequence[int], batch: int = 8) -> tuple[Worker, list[list[Told]]]:
    line = Line(batch, 0.0)
    told: list[list[Told]] = [[] for _ in sizes]
    for n, size in enumerate(sizes):
        line.put(Waiting(Prompt({"input_ids": torch.ones(1, size)}, ""), "p", Choice(1), told[n].append))
    line.close()
    worker = Worker(line, model, lambda _: None)
    worker.start()
    worker.join(20)
    return worker, told


ANSWER = [Piece("x"), Finished("stop", 1)]


def test_a_request_that_fails_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(RuntimeError("a secret of the server"))
    with caplog.at_level(logging.ERROR, "dropflow.serve"):
        _, told = run(model, [4, 13, 5])
    assert told[0] == told[2] == ANSWER
    (error,) = told[1]
    assert isinstance(error, ApiError)
    assert (error.status, error.code) == (500, "internal_error")
    assert "secret" not in error.message
    assert "a secret of the server" in caplog.text
    assert model.batches == [3, 1, 1, 1]


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    model = Model(RuntimeError(), begins=True)
    _, told = run(model, [4, 13])
    assert [type(one) for one in told[0]] == [type(one) for one in told[1]] == [Piece, ApiError]
    assert model.batches == [2]


def test_refusals_of_the_engine_are_told() -> None:
    _, told = run(Model(UnsupportedCall("position_ids: not like this; leave them out")), [13])
    (error,) = told[0]
    assert isinstance(error, ApiError)
    assert (error.status, error.message) == (400, "position_ids: not like this; leave them out")


def test_when_the_thread_ends_everybody_is_told() -> None:
    worker, told = run(Model(SystemExit()), [13, 4, 4], batch=1)
    assert isinstance(worker.failure, SystemExit)
    assert [type(one) for one in told[0]] == []  # its own request is ended by the server, which stops
    assert all(isinstance(one, ApiError) and one.status == 503 for (one,) in told[1:])

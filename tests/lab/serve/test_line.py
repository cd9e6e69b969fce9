"""How batches are formed: by kind, oldest first, without waiting for nobody."""

from __future__ import annotations

import threading
import time

import torch

from dropflow_lab.serve.line import Line
from dropflow_lab.serve.prompt import Prompt, joined
from dropflow_lab.serve.waiting import Choice, Waiting


def prompt(tokens: int = 4, **others: torch.Tensor) -> Prompt:
    return Prompt({"input_ids": torch.full((1, tokens), 7), "attention_mask": torch.ones(1, tokens), **others}, "")


def waiting(policy: str, of: Prompt | None = None) -> Waiting:
    return Waiting(of or prompt(), policy, Choice(1), lambda _: None)


def test_a_batch_has_one_policy_and_begins_with_the_oldest() -> None:
    line = Line(3, 0.0)
    requests = [waiting(policy) for policy in "abaabba"]
    for request in requests:
        assert line.put(request)
    first, second, third = line.take(), line.take(), line.take()
    assert first == [requests[0], requests[2], requests[3]]
    assert second == [requests[1], requests[4], requests[5]]
    assert third == [requests[6]]
    assert len(line) == 0


def test_prompts_of_other_kinds_are_not_mixed() -> None:
    line = Line(8, 0.0)
    tiles = [waiting("a", prompt(pixel_values=torch.zeros(1, n, 3, 2, 2))) for n in (2, 3, 2)]
    text = waiting("a", prompt(9))
    for request in (*tiles, text):
        line.put(request)
    assert line.take() == [tiles[0], tiles[2]]
    assert line.take() == [tiles[1]]
    assert line.take() == [text]


def test_what_is_not_a_tensor_is_answered_alone() -> None:
    one, other = Prompt(prompt().inputs | {"sizes": [1]}, ""), Prompt(prompt().inputs | {"sizes": [1]}, "")
    assert one.shape == one.shape != other.shape


def test_cancelled_requests_leave_the_line() -> None:
    line = Line(8, 0.0)
    gone, stays = waiting("a"), waiting("a")
    line.put(gone)
    line.put(stays)
    gone.cancelled = True
    assert line.take() == [stays]


def test_a_batch_waits_for_requests_that_are_being_prepared_and_for_no_others() -> None:
    line = Line(2, 30.0)
    line.put(waiting("a"))
    began = time.monotonic()
    assert len(line.take() or ()) == 1
    assert time.monotonic() - began < 10
    late = waiting("a")

    def prepare() -> None:
        with line.expecting():
            entered.set()
            put.wait(20)
            line.put(late)

    entered, put = threading.Event(), threading.Event()
    thread = threading.Thread(target=prepare)
    thread.start()
    entered.wait(20)
    line.put(early := waiting("a"))
    threading.Timer(0.1, put.set).start()
    assert line.take() == [early, late]
    thread.join()


def test_a_wait_is_bounded() -> None:
    line = Line(2, 0.05)
    with line.expecting():
        line.put(early := waiting("a"))
        assert line.take() == [early]


def test_a_closed_line_is_emptied_first() -> None:
    line = Line(8, 0.0)
    line.put(last := waiting("a"))
    line.close()
    assert not line.put(waiting("a"))
    assert line.take() == [last]
    assert line.take() is None


def test_joined_prompts_are_padded_on_the_left() -> None:
    one, two = prompt(2, pixel_values=torch.zeros(1, 3)), prompt(3, pixel_values=torch.ones(2, 3))
    batch = joined([one, two], 0)
    assert batch["input_ids"].tolist() == [[0, 7, 7], [7, 7, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["pixel_values"].sum(1).tolist() == [0, 3, 3]
    assert joined([one], 0) is one.inputs

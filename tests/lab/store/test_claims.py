"""Claimed work: done once by one process, put off by the others, and free again when a process is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from dropflow_lab.errors import InputError
from dropflow_lab.store.claims import Taken, claimed, in_order
from dropflow_lab.store.finished import Finished

HOLD = """
import sys, time
from pathlib import Path
from dropflow_lab.store.claims import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
SHARE = """
import sys, time, json
from functools import partial
from pathlib import Path
from dropflow_lab.store.claims import in_order
from dropflow_lab.store.finished import Finished
finished, own = Finished(Path(sys.argv[1])), []
def measure(number):
    own.append(number)
    time.sleep(0.05)
    return number * number
def once(number):
    return finished.once(f"piece-{number}", {}, partial(measure, number), int, int)
print(json.dumps([list(in_order(partial(once, number) for number in range(12))), own]))
"""


def test_a_killed_process_frees_what_it_held(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / "piece.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Taken), claimed(lock):
            pytest.fail("two processes hold one lock")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with claimed(lock):
        assert lock.exists()
    assert not lock.exists()


def test_work_that_fails_stays_undone_and_free(tmp_path: Path) -> None:
    finished, tries = Finished(tmp_path), []

    def measure() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt
        return 7

    with pytest.raises(KeyboardInterrupt):
        finished.once("piece", {}, measure, int, int)
    assert [finished.once("piece", {}, measure, int, int) for _ in range(2)] == [7, 7]
    assert (len(tries), [path.suffix for path in tmp_path.iterdir()]) == (2, [".json"])


def test_processes_do_every_piece_once_and_all_have_every_result(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARE, str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [json.loads(worker.communicate()[0]) for worker in workers]
    assert [result for result, _ in told] == [[number * number for number in range(12)]] * 3
    assert sorted(number for _, own in told for number in own) == list(range(12))
    assert len(list(tmp_path.iterdir())) == 12


def test_results_are_in_order_and_taken_jobs_are_put_off() -> None:
    ran: list[int] = []
    busy = {1: 2, 2: 1}

    def job(number: int) -> int:
        ran.append(number)
        if busy.get(number):
            busy[number] -= 1
            raise Taken
        return number

    results = in_order([lambda number=number: job(number) for number in range(4)])
    assert next(results) == 0
    assert ran == [0]  # as soon as it is known
    assert list(results) == [1, 2, 3]
    assert ran == [0, 1, 2, 3, 1, 2, 1]


def test_waiting_takes_little_time_off_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def job() -> int:
        if len(pauses) < 8:
            raise Taken
        return 1

    assert list(in_order([job])) == [1]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    with pytest.raises(InputError, match="expected a file system with file locks"), claimed(tmp_path / "piece.lock"):
        pytest.fail("claimed")

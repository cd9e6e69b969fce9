"""The state of a training run on disk: whole, or refused by name."""

from __future__ import annotations

import pytest
import torch

from dropflow_lab.digits.training.journal import Journal


def test_a_state_comes_back_with_the_log_that_belongs_to_it(tmp_path) -> None:
    journal = Journal(tmp_path, {"seed": 1})
    journal.append(step=1)
    journal.save({"step": 1})
    journal.append(step=2)
    state = Journal(tmp_path, {"seed": 1}).restore()
    assert state is not None
    assert state["step"] == 1
    assert journal.log_path.read_text() == '{"step": 1}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "training-log.jsonl"}


def test_a_damaged_state_is_named(tmp_path) -> None:
    journal = Journal(tmp_path, {})
    journal.save({"step": 1})
    journal.state_path.write_bytes(journal.state_path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.pt: damaged; delete it to train from the beginning"):
        journal.restore()


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch) -> None:
    journal = Journal(tmp_path, {})
    journal.save({"step": 1})

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="is the disk full") as refused:
        journal.save({"step": 2})
    assert refused.value.filename == str(journal.state_path)
    state = journal.restore()
    assert state is not None
    assert state["step"] == 1

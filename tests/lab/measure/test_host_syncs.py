"""Counting where the host waits for a GPU, with torch's debug mode played by a stand-in."""

from __future__ import annotations

import warnings

import pytest
import torch

from dropflow_lab.measure.host_syncs import count_host_syncs


def test_every_warning_of_the_debug_mode_counts_and_the_mode_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run() -> None:
        for text in ("called a synchronizing CUDA operation", "something else") * 2:
            warnings.warn(text, stacklevel=1)

    assert count_host_syncs(run, torch.device("cuda")) == 2
    assert modes == ["warn", 0]
    with pytest.raises(ZeroDivisionError):
        count_host_syncs(lambda: 1 / 0, torch.device("cuda"))
    assert modes == ["warn", 0] * 2


def test_there_are_none_without_a_gpu() -> None:
    assert count_host_syncs(lambda: None, torch.device("cpu")) is None

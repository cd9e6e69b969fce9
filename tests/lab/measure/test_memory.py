"""Peak memory against arithmetic."""

from __future__ import annotations

import torch

from dropflow_lab.measure.memory import peak_bytes

CPU = torch.device("cpu")


def test_the_peak_is_what_is_alive_at_once() -> None:
    def two_then_one() -> None:
        first = torch.empty(1000, 1000)
        second = first.clone()
        del first
        torch.empty(500, 1000)
        del second

    assert peak_bytes(two_then_one, CPU) == 2 * 4_000_000


def test_what_is_freed_first_does_not_count() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(1000, 1000)

    assert peak_bytes(one_after_the_other, CPU) == 4_000_000


def test_what_was_there_before_does_not_count() -> None:
    held = torch.ones(1000, 1000)
    assert peak_bytes(lambda: held.add_(1), CPU) < 1000

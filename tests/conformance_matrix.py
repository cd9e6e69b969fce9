"""Collects the cells of the conformance matrix, from all worker processes, and prints their counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest

from dropflow.testing import Cell

CELLS = pytest.StashKey[list[Cell]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CELLS] = []
    config.pluginmanager.register(Gather(config))


@pytest.fixture
def cells(request: pytest.FixtureRequest) -> list[Cell]:
    """Outcomes so far."""
    found: list[Cell] = request.config.stash[CELLS]
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # in a worker process of pytest-xdist
        session.config.workeroutput["cells"] = [asdict(cell) for cell in session.config.stash[CELLS]]


class Gather:
    """Hooks that only pytest-xdist calls, in its controlling process."""

    def __init__(self, config: pytest.Config) -> None:
        self._cells = config.stash[CELLS]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take the cells of a worker that is done."""
        self._cells += [Cell(**cell) for cell in getattr(node, "workeroutput", {}).get("cells", [])]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[CELLS]
    if not found:
        return
    counts = Counter(cell.outcome for cell in found)
    terminalreporter.section("conformance")
    terminalreporter.line(
        f"{len(found)} cells: {counts['run']} run, {counts['refused']} refused, {counts['failed']} failed; "
        f"largest relative error {max(cell.error for cell in found):.1e}"
    )
    for cell in found:
        if cell.detail:
            terminalreporter.line(f"{cell.outcome}: {cell.stage} x {cell.adapter}: {cell.detail}")
    by_family: dict[str, float] = {}
    for cell in found:
        by_family[cell.adapter] = max(by_family.get(cell.adapter, 0.0), cell.error)
    terminalreporter.line(", ".join(f"{name} {error:.1e}" for name, error in sorted(by_family.items())))

"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from documents import EXTENSION, install
from tiny import tiny_llava

torch.set_num_threads(1)
collect_ignore = ["extension"]  # a package of its own: `test_extension.py` installs it and runs its tests

pytest_plugins = ["conformance_matrix"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process, but let families of the conformance matrix run in several."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        family = parameters.get("adapter", "") if item.path.name == "test_conformance.py" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{item.path.parent.name}-{family}"))


def pytest_collection_finish() -> None:
    """Exempt what has been imported, half a million objects, from garbage collection, which would scan it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _shared_llava() -> Any:
    return tiny_llava()


@pytest.fixture
def llava(_shared_llava: Any) -> Iterator[Any]:
    """A tiny LLaVA (six Llama layers, grouped KV heads) that tests must leave as they found it."""
    yield _shared_llava
    _shared_llava.eval()
    assert "layers" not in _shared_llava.get_decoder().__dict__


@pytest.fixture(scope="session")
def installed_extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `tests/extension` is installed to; nothing is fetched, and this environment stays as it is."""
    return install(EXTENSION, tmp_path_factory.mktemp("site"))


@pytest.fixture
def extension(installed_extension: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The extension is found in this process, as if it were installed beside the engine."""
    monkeypatch.syspath_prepend(str(installed_extension))
    monkeypatch.syspath_prepend(str(EXTENSION / "tests"))
    yield EXTENSION
    for name in [name for name in sys.modules if name.split(".")[0] in ("dropflow_example", "tiny_deepseek_vl")]:
        del sys.modules[name]

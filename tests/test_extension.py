"""A package from outside is installed, is found by its entry points alone, and passes its own tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from documents import EXTENSION, passes_its_tests

forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@forking
def test_the_installed_extension_passes_its_own_tests(installed_extension: Path, tmp_path: Path) -> None:
    passes_its_tests(EXTENSION, installed_extension, tmp_path / "told.txt")


def test_adapter_and_stage_are_short() -> None:
    for name in ("top_p.py", "deepseek_vl.py"):
        assert len((EXTENSION / "dropflow_example" / name).read_text(encoding="utf-8").splitlines()) <= 60

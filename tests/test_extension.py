"""A package from outside is installed, is found by its entry points alone, and passes its own tests."""

from __future__ import annotations

from pathlib import Path

from documents import EXTENSION, passes_its_tests


def test_the_installed_extension_passes_its_own_tests(installed_extension: Path) -> None:
    passes_its_tests(EXTENSION, installed_extension)


def test_adapter_and_stage_are_short() -> None:
    for name in ("top_p.py", "deepseek_vl.py"):
        assert len((EXTENSION / "dropflow_example" / name).read_text(encoding="utf-8").splitlines()) <= 60

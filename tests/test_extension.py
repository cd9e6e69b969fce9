"""A package from outside is installed, is found by its entry points alone, and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from documents import EXTENSION


def test_the_installed_extension_passes_its_own_tests(installed_extension: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(EXTENSION), "tests"],
        cwd=EXTENSION,
        env=os.environ | {"PYTHONPATH": str(installed_extension), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_adapter_and_stage_are_short() -> None:
    for name in ("top_p.py", "deepseek_vl.py"):
        assert len((EXTENSION / "dropflow_example" / name).read_text(encoding="utf-8").splitlines()) <= 60

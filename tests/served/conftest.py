"""What `make test-vllm` has written beforehand; here `dropflow` itself is not installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def asked() -> Path:
    """The folder with models, pictures, prompts, and the engine's answers (`ask_engine.py`)."""
    if "DROPFLOW_ASKED" not in os.environ:
        pytest.skip("`make test-vllm` asks the engine first")
    return Path(os.environ["DROPFLOW_ASKED"]).resolve()


@pytest.fixture(scope="session")
def told(asked: Path) -> dict[str, Any]:
    """What was asked, and the cases with their answers."""
    found: dict[str, Any] = json.loads((asked / "cases.json").read_text(encoding="utf-8"))
    return found

"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny import tiny_llava

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _shared_llava() -> Any:
    return tiny_llava()


@pytest.fixture
def llava(_shared_llava: Any) -> Iterator[Any]:
    """A tiny LLaVA (six Llama layers, grouped KV heads) that tests must leave as they found it."""
    yield _shared_llava
    _shared_llava.eval()
    assert "layers" not in _shared_llava.get_decoder().__dict__

"""Whether code is compiled or exported is asked in one place, and told of this thread alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDROP, prompt, relative_error
from torch import Tensor, nn

import dropflow
from dropflow.backbone import compiling
from dropflow.engine.tokens.cache_layers import FlowLayer
from dropflow.engine.tokens.room import SMALL


def test_nobody_else_asks_torch() -> None:
    home = Path(dropflow.__file__).parent.parent
    asking = {
        str(path.relative_to(home))
        for path in home.glob("dropflow*/**/*.py")
        if any(name in path.read_text() for name in ("is_compiling", "is_dynamo_compiling", "is_exporting"))
    }
    assert asking == {"dropflow/backbone/compiling.py"}


def test_a_graph_sees_itself_and_the_code_beside_it_does_not() -> None:
    def told(states: Tensor) -> Tensor:
        return states + (1 if compiling.is_traced() else 0)

    assert told(torch.zeros(1)).item() == 0
    assert torch.compile(told, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1


@torch.no_grad()
def test_a_cache_grows_in_place_while_another_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def grown() -> FlowLayer:
        layer, states = FlowLayer(), torch.ones(1, 8, SMALL // 32 // 64, 64)
        for _ in range(3):
            layer.update(states, states)
        return layer

    places = grown().keys.untyped_storage().nbytes()
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    held = grown()
    assert held.keys.untyped_storage().nbytes() == places > held.keys.nbytes


SEEN: list[bool] = []
"""What an exported model was told; an export takes back what it writes to itself."""


class Waits(nn.Module):
    """Lets another thread run while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.ends = threading.Event(), threading.Event()

    def forward(self, states: Tensor) -> Tensor:
        SEEN.append(compiling.is_exported())
        self.runs.set()
        assert self.ends.wait(60)
        return states + 1


@torch.no_grad()
def test_a_policy_serves_while_another_thread_exports_another_model(llava: Any) -> None:
    inputs, other = prompt(), Waits()
    SEEN.clear()
    with dropflow.attach(llava, HIDROP):
        expected = llava(**inputs).logits
        thread = threading.Thread(target=torch.export.export, args=(other, (torch.ones(2),)), kwargs={"strict": False})
        thread.start()
        try:
            assert other.runs.wait(60)
            assert torch.compiler.is_exporting()
            assert not compiling.is_exported()
            assert relative_error(llava(**inputs).logits, expected) < 1e-5  # transformers makes masks meanwhile
        finally:
            other.ends.set()
            thread.join()
    assert SEEN == [True]

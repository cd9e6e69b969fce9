"""The house: imports run one way, and every hook is documented with its signature."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from packages import PACKAGES


def modules(package: str) -> Iterator[Path]:
    root = Path(importlib.import_module(package).__path__[0])
    yield from root.rglob("*.py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_towards_the_engine(package: str) -> None:
    allowed = {package, "dropflow"} if package != "dropflow" else {"dropflow"}
    for path in modules(package):
        own = {name for name in imported(path) if name.startswith("dropflow")}
        assert own <= allowed, f"{path} imports {sorted(own - allowed)}"


def test_the_engine_names_no_method_and_no_backbone() -> None:
    words = ("hidrop", "mustdrop", "clip", "siglip", "qwen", "mistral")
    for path in modules("dropflow"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)] + [
            n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
        ]
        assert not [name for name in named if any(word in name.lower() for word in words)], path


def test_flash_attention_and_torchvision_are_never_imported() -> None:
    for package in PACKAGES:
        for path in modules(package):
            assert not imported(path) & {"flash_attn", "torchvision", "torchaudio"}, path


def test_every_hook_is_in_the_docs_with_its_signature() -> None:
    from dropflow.lifecycle.hooks import HOOKS, Lifecycle

    docs = Path(__file__).parents[2] / "docs" / "stages.md"
    if not docs.exists():
        pytest.skip("the docs are not beside the tests")
    text = docs.read_text(encoding="utf-8")
    for hook in HOOKS:
        signature = str(inspect.signature(getattr(Lifecycle, hook))).replace("'", "").replace("(self, ", "(")
        assert f"{hook}{signature}" in text, f"docs/stages.md lacks `{hook}{signature}`"

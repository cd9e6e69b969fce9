"""The house: imports run down from room to room, nobody reaches into the engine, and every hook is documented."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pydoc
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packages import PACKAGES

ROOMS = (
    ("errors",),
    ("units",),
    ("lifecycle",),
    ("policy", "operators"),
    ("backbone",),
    ("engine.model", "engine.tokens"),
    ("engine.decoder",),
    ("engine.vision",),
    ("engine.attach",),
    ("testing",),
    ("__main__",),
)
"""Rooms of `dropflow` from the ground up. A room imports itself and floors below; rooms of one floor know nothing of
each other."""
LAB = (
    ("errors",),
    ("files",),
    ("markdown",),
    ("digits.data",),
    ("digits.checkpoints",),
    ("digits.training", "inputs"),
    ("measure", "store"),
    ("backbones", "compare", "explain", "finetune", "profile", "serve", "trace"),
    ("bench", "tune"),
    ("console",),
)
"""The same for `dropflow_lab`."""
PUBLIC = {"dropflow", "dropflow.errors", "dropflow.operators"}
"""What plug-ins and adapters may import of `dropflow`."""
BRIDGES = {
    "dropflow_lmms": ("dropflow_lab.digits", "dropflow_lab.errors", "dropflow_lab.inputs", "dropflow_lab.measure")
}
"""Bridges to other programs -> the rooms of the lab that they import: they load models, ask and count as instruments
do, so that a harness gives the numbers of `dropflow compare`."""


@functools.cache
def files(package: str) -> dict[str, Path]:
    """Dotted name of every module of an installed package -> its file."""
    root = Path(importlib.import_module(package).__path__[0])
    found = {}
    for path in root.rglob("*.py"):
        parts = (package, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def statements(path: Path) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """The imports of a file that happen at run time, wherever they stand."""
    annotations = {
        id(node)
        for block in ast.walk(tree(path))
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = (node for node in ast.walk(tree(path)) if isinstance(node, ast.Import | ast.ImportFrom))
    return tuple(node for node in found if id(node) not in annotations)


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules that a file imports at run time, wherever it does so; names out of `known` are modules, too."""
    found: set[str] = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module:
            assert not node.level, f"{path}: a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(node.module)
    return found


def arrows(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports."""
    modules = files(package)
    return {name: imports(path, modules.keys()) & modules.keys() - {name} for name, path in modules.items()}


def room(module: str, floors: tuple[tuple[str, ...], ...]) -> tuple[int, str]:
    """Floor and room of a module of a package."""
    inside = module.partition(".")[2]
    for floor, rooms in enumerate(floors):
        for one in rooms:
            if inside == one or inside.startswith(f"{one}."):
                return floor, one
    raise AssertionError(f"{module} lies in no room; the house is described in CONTRIBUTING.md")


def circles(graph: dict[str, set[str]]) -> list[str]:
    """One line for each import that closes a circle."""
    found, done, path = [], set(), []

    def visit(node: str) -> None:
        path.append(node)
        for target in sorted(graph.get(node, ())):
            if target in path:
                found.append(" -> ".join([*path[path.index(target) :], target]))
            elif target not in done:
                visit(target)
        done.add(path.pop())

    for node in sorted(graph):
        if node not in done:
            visit(node)
    return found


@pytest.mark.parametrize(("package", "floors"), [("dropflow", ROOMS), ("dropflow_lab", LAB)])
def test_arrows_run_down(package: str, floors: tuple[tuple[str, ...], ...]) -> None:
    wrong = []
    for module, targets in arrows(package).items():
        parents = {".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 1)}
        if module == package or any(name.startswith(f"{module}.") for name in files(package)):
            continue  # `__init__` re-exports; the packages of rooms hold nothing of their own
        floor, own = room(module, floors)
        for target in targets - parents - {package}:
            below, other = room(target, floors)
            if not (below < floor or other == own):
                wrong.append(f"{module} -> {target}")
        if package in targets:
            wrong.append(f"{module} -> {package}, whose names are for others")
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles_between_files(package: str) -> None:
    assert not circles(arrows(package))


@pytest.mark.parametrize("package", ["dropflow", "dropflow_lab"])
def test_no_circles_between_folders(package: str) -> None:
    modules = files(package)
    folder = {name: path.parent for name, path in modules.items()}
    graph: dict[str, set[str]] = {}
    for module, targets in arrows(package).items():
        if module != package:
            own = graph.setdefault(str(folder[module]), set())
            own |= {str(folder[target]) for target in targets if target != package} - {str(folder[module])}
    assert not circles(graph)


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "dropflow"])
def test_others_import_the_public_names_alone(package: str) -> None:
    for module, path in files(package).items():
        own = {name for name in imports(path, files("dropflow").keys()) if name.split(".")[0].startswith("dropflow")}
        own = {name for name in own if not name.startswith(BRIDGES.get(package, ()))}
        others = {name for name in own if name.split(".")[0] not in (package, "dropflow")}
        assert not others, f"{module} imports {sorted(others)} sideways"
        reached = {name for name in own if name.split(".")[0] == "dropflow"}
        if package == "dropflow_lab":  # the instruments look at every room, but for two
            forbidden = {name for name in reached if name.startswith(("dropflow.engine", "dropflow.testing"))}
        else:
            forbidden = reached - PUBLIC
        assert not forbidden, f"{module} imports {sorted(forbidden)}; public are {sorted(PUBLIC)}"


def test_the_engine_names_no_method_and_no_backbone() -> None:
    words = ("hidrop", "mustdrop", "clip", "siglip", "qwen", "mistral")
    for module, path in files("dropflow").items():
        if module.startswith("dropflow.testing.families"):
            continue
        nodes = list(ast.walk(tree(path)))
        named = [n.id for n in nodes if isinstance(n, ast.Name)] + [
            n.attr for n in nodes if isinstance(n, ast.Attribute)
        ]
        assert not [name for name in named if any(word in name.lower() for word in words)], path


def test_flash_attention_and_torchvision_are_never_imported() -> None:
    for package in PACKAGES:
        for path in files(package).values():
            roots = {name.split(".")[0] for name in imports(path, set())}
            assert not roots & {"flash_attn", "torchvision", "torchaudio"}, path


def test_every_hook_is_in_the_docs_with_its_signature() -> None:
    from dropflow.lifecycle.hooks import HOOKS, Lifecycle

    docs = Path(__file__).parents[2] / "docs" / "stages.md"
    if not docs.exists():
        pytest.skip("the docs are not beside the tests")
    text = docs.read_text(encoding="utf-8")
    for hook in HOOKS:
        signature = str(inspect.signature(getattr(Lifecycle, hook))).replace("'", "").replace("(self, ", "(")
        assert f"{hook}{signature}" in text, f"docs/stages.md lacks `{hook}{signature}`"


def undocumented(kind: type) -> list[str]:
    """Public fields and methods of a class that no text follows."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = []
    for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found += [] if told else [statement.target.id]
        elif isinstance(statement, ast.FunctionDef) and not ast.get_docstring(statement):
            found.append(statement.name)
    return [f"{kind.__name__}.{name}" for name in found if not name.startswith("_")]


@pytest.mark.parametrize("package", ["dropflow", "dropflow.testing"])
def test_every_public_field_and_method_has_a_text(package: str) -> None:
    public = importlib.import_module(package)
    kinds = [kind for name in public.__all__ if inspect.isclass(kind := getattr(public, name))]
    assert [fault for kind in kinds for fault in undocumented(kind)] == []

    class Silent:
        field: int = 0

        def method(self) -> None:
            pass

    assert undocumented(Silent) == ["Silent.field", "Silent.method"]


@pytest.mark.parametrize("package", ["dropflow", "dropflow.testing"])
def test_help_shows_the_text_of_every_public_field(package: str) -> None:
    from dropflow.lifecycle.field_texts import field_texts

    public = importlib.import_module(package)
    kinds = [kind for name in public.__all__ if inspect.isclass(kind := getattr(public, name))]
    fields = {kind: field_texts(kind) for kind in kinds}
    for kind, texts in fields.items():
        shown = " ".join(pydoc.plain(pydoc.render_doc(kind)).replace("|", "").split())
        missing = [name for name, (_, text) in texts.items() if " ".join(text.split()) not in shown]
        assert not missing, f"help({kind.__name__}) lacks {missing}"
    assert sum(map(len, fields.values())) > (80 if package == "dropflow" else 10)


def test_docstrings_of_classes_need_no_source_and_none_at_all() -> None:
    code = "import dropflow; print(dropflow.EncodeCall.__doc__, dropflow.Keep.__doc__)"
    done = subprocess.run(
        [sys.executable, "-OO", "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("EncodeCall(")  # what dataclasses make where there is no docstring

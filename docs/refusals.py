"""Renews the tables of docs/troubleshooting.md: every message that refuses something, read off the source code.

`make troubleshooting` runs it; with `--lacking` it prints the messages that say nothing of what to do. A hole in a
message, filled when it is raised, is shown as `…`; what follows the semicolon is what to do.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeGuard

from dropflow_lab.markdown import renew, table

ROOT = Path(__file__).parents[1]
SOURCE = ("core/dropflow", "core/dropflow_lab", "plugins", "adapters")
ROOT_ERROR = "DropflowError"
HOLE = "…"
SPOKEN = {
    "CACHE_ARGUMENT": "past_key_values",
    "REMEDY": "run this policy on transformers, or use stages that encode alone",
}
"""Holes that say the same in every message."""
OPTION = {"model_validator", "field_validator", "BeforeValidator"}
"""What makes a `ValueError` of a function a fault of a policy."""

POLICIES, ATTACHING, CALLING, CACHES = "policy files", "attaching", "calling", "caches and generate"
TRAINING, STAGES, BACKBONES, COMMANDS = "training", "stages", "backbones", "the command line"
BRIDGES = "harnesses"
GROUPS = (POLICIES, ATTACHING, CALLING, CACHES, TRAINING, STAGES, BACKBONES, COMMANDS, BRIDGES)
RULES: tuple[tuple[str, str, str, str], ...] = (
    ("dropflow_lab/(finetune|digits)", "", "", TRAINING),
    ("dropflow_lab", "", "", COMMANDS),
    ("dropflow_vllm|encode_faults|lifecycle/lazy", "", "", ATTACHING),
    ("adapters/dropflow_lmms", "", "", BRIDGES),
    ("", "DecisionError", "", STAGES),
    ("dropflow/(policy|units|lifecycle/stage)|plugins", "", "", POLICIES),
    ("dropflow/backbone/wrapped", "", "", ATTACHING),
    ("dropflow/backbone|adapters", "", "", BACKBONES),
    ("", "", r"FSDP2|trains its selection|its selection trains", TRAINING),
    ("dropflow/", "", r"^past_key_values|^crop|cache layer|sliding window", CACHES),
    ("dropflow/engine/attach/(attach|flow|pretrained)", "", "", ATTACHING),
    ("dropflow/engine/(vision/encoding|tokens)", "UnsupportedModel", "", BACKBONES),
    ("", "PolicyError|UnsupportedModel", "", ATTACHING),
    ("", "", "", CALLING),
)
"""Patterns of file, error and message, and the group of the first rule that fits all three."""


@dataclass(frozen=True)
class Refusal:
    """One message."""

    message: str
    """What it says, less what to do."""
    remedy: str
    """What to do; empty where it says nothing of that."""
    error: str
    """The class that is raised."""
    place: str
    """File and function."""

    @property
    def group(self) -> str:
        """What the reader was doing."""
        told = (self.place, self.error, self.message)
        return next(group for *parts, group in RULES if all(map(re.search, parts, told)))


@cache
def refusals() -> list[Refusal]:
    """Every message of the source tree, file by file."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _files()}
    errors = _errors(trees.values())
    found: dict[tuple[str, str], Refusal] = {}
    for path, tree in trees.items():
        for node, error, functions in _messages(tree, errors, lab="dropflow_lab" in path.parts):
            message = _text(node, _names(functions))
            if not re.search(r"\w{3,} \w+", message):
                continue  # passes on what was said elsewhere
            file = path.relative_to(ROOT).as_posix()
            place = f"{file.removeprefix('core/')}: {functions[-1].name}" if functions else file
            found.setdefault((message, error), Refusal(*_split(message), error, place))
    return list(found.values())


def error_classes() -> list[tuple[str, str, str]]:
    """Every class, the builtin that it keeps, and when it is raised."""
    trees = [ast.parse((ROOT / f"core/{package}/errors.py").read_text(encoding="utf-8")) for package in
             ("dropflow", "dropflow_lab")]  # fmt: skip
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    classes = [node for node in nodes if not node.name.startswith("_")]
    return [
        (f"`{node.name}`", f"`{ast.unparse(node.bases[-1])}`", ast.get_docstring(node) or "")
        for node in classes
        if node.name != ROOT_ERROR
    ]


def _files() -> Iterator[Path]:
    for folder in SOURCE:
        yield from sorted((ROOT / folder).rglob("*.py"))


def _errors(trees: Iterable[ast.Module]) -> set[str]:
    """Names of all classes under the root of errors."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = {ROOT_ERROR}
    while more := {node.name for node in classes if found & {ast.unparse(base) for base in node.bases}} - found:
        found |= more
    return found


Functions = list[ast.FunctionDef]
Message = tuple[ast.expr, str, Functions]


def _messages(tree: ast.Module, errors: set[str], *, lab: bool) -> Iterator[Message]:
    """Expressions that are messages, the error they are raised with, and the functions they stand in."""
    collected = "InputError" if lab else "PolicyError"
    for node, functions in _within(tree, []):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if node.func.id in errors:
                yield node.args[0], node.func.id, functions
            elif node.func.id == "ValueError" and any(map(_validates, functions)):
                yield node.args[0], collected, functions
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.append":
            yield node.args[0], collected, functions
        elif _collects(node, functions):
            yield from ((part, collected, functions) for part in _listed(node.value))


def _within(node: ast.AST, functions: Functions) -> Iterator[tuple[ast.AST, Functions]]:
    for child in ast.iter_child_nodes(node):
        yield child, functions
        yield from _within(child, [*functions, child] if isinstance(child, ast.FunctionDef) else functions)


def _collects(node: ast.AST, functions: Functions) -> TypeGuard[ast.Assign | ast.AugAssign | ast.Return]:
    """Whether a statement adds to a list of faults, or returns one."""
    if isinstance(node, ast.Return):
        return bool(functions) and "faults" in functions[-1].name
    names = ("faults ", "message ") if functions and "faults" in functions[-1].name else ("faults ",)
    return isinstance(node, ast.AugAssign | ast.Assign) and ast.unparse(node).startswith(names)


def _validates(function: ast.FunctionDef) -> bool:
    """Whether pydantic calls it, or what it makes."""
    return any(isinstance(node, ast.Name) and node.id in OPTION for node in ast.walk(function))


def _listed(value: ast.expr | None) -> Iterator[ast.expr]:
    """Messages of a list, of a comprehension, or of their sum; or the one that it is itself."""
    if isinstance(value, ast.BinOp):
        yield from (*_listed(value.left), *_listed(value.right))
    elif isinstance(value, ast.List):
        yield from value.elts
    elif isinstance(value, ast.ListComp):
        yield value.elt
    elif isinstance(value, ast.JoinedStr):
        yield value


def _names(functions: Functions) -> dict[str, ast.expr]:
    """Local names that are given one text, and only once."""
    given: dict[str, list[ast.expr]] = {}
    for node in (node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            given.setdefault(node.targets[0].id, []).append(node.value)
    texts = ast.Constant | ast.JoinedStr
    return {name: found[0] for name, found in given.items() if len({id(v) for v in found}) == 1
            and isinstance(found[0], texts)}  # fmt: skip


def _text(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """The message with its holes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub(f"{HOLE}+", HOLE, "".join(_text(part, names) for part in node.values))
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, names)
    if isinstance(node, ast.BinOp):
        return _text(node.left, names) + _text(node.right, names)
    if isinstance(node, ast.Name):
        return SPOKEN.get(node.id) or (_text(names[node.id], names) if node.id in names else HOLE)
    if isinstance(node, ast.Call):
        return _called(node)
    return HOLE


def _called(node: ast.Call) -> str:
    """Holes that are filled by a call."""
    name = ast.unparse(node.func)
    if name == "nearest":
        return f"did you mean {HOLE}?"
    if name.split(".")[-1] == "path" and node.args:
        option = node.args[0]
        return f"stages.{HOLE}.{str(option.value) if isinstance(option, ast.Constant) else HOLE}"
    return HOLE


def _split(message: str) -> tuple[str, str]:
    """What is wrong, and what to do."""
    said, _, remedy = message.partition("; ")
    if remedy:
        return said, remedy
    for pattern, do in (
        (r"(.*): (pip install .*)", "{}"),
        (r"(.*?)\. ((?:[A-Z]|did you).*)", "{}"),
        (r"(.*?): ((?:list|pass) .*)", "{}"),
        (r"(.*?)(did you mean .*)", "take a name that exists: {}"),
        (r"(.*?) \((see .*)\)", "{}"),
        (r"(.*expected (.*?)(?:,? (?:but )?(?:got|found|not)\b.*|: .*|$))", "give {}"),
        (r"(.*an override is written (.*))", "write {}"),
    ):
        if found := re.fullmatch(pattern, message, re.DOTALL):
            return found[1].rstrip(), do.format(found[2])
    return message, ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def tables() -> dict[str, str]:
    """Group -> its table."""
    found = refusals()
    head = ("what it says", "what to do", "error, and where it is raised")
    rows = {
        group: [
            (_cell(one.message), _cell(one.remedy), f"`{one.error}`<br>`{one.place}`")
            for one in found
            if one.group == group
        ]
        for group in GROUPS
    }
    classes = table(("error", "is also a", "raised when"), error_classes())
    return {"errors": classes} | {group: table(head, own) for group, own in rows.items()}


def write(document: Path) -> None:
    """Renew every table of the page."""
    for name, text in tables().items():
        renew(document, name, text)


if __name__ == "__main__":
    if "--lacking" in sys.argv:
        print("\n".join(f"{one.place}: {one.message}" for one in refusals() if not one.remedy))
    else:
        write(ROOT / "docs" / "troubleshooting.md")

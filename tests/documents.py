"""The code blocks of a document, and what it takes to run them in order."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

import dropflow

ROOT = Path(__file__).parents[1]
EXTENSION = ROOT / "tests" / "extension"
"""The package that the tutorials build."""
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    title: str
    """What `title="..."` says: the file of the extension that the block is a part of, or `output`."""
    text: str
    line: int


def blocks(name: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a document, of one language or of all."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the tests")
    text = path.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', fence[2])
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(fence[1], title[1] if title else "", fence[3], line))
    return [block for block in found if language in (None, block.language)]


def files_of(name: str) -> dict[str, str]:
    """Title -> the blocks of that title, joined: the files that a tutorial writes."""
    found: dict[str, str] = {}
    for block in blocks(name):
        if "." in block.title:
            found[block.title] = found.get(block.title, "") + block.text
    return found


def install(package: Path, folder: Path) -> Path:
    """Install a package to a folder; nothing is fetched, and this environment stays as it is."""
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--target", str(folder)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    done = subprocess.run([*pip, *flags, str(package)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def passes_its_tests(package: Path, folder: Path, told: Path) -> None:
    """Run the tests of a package that is installed to `folder`, in a fork of this process; `told` gets what it prints.

    A new process would do the same, but import torch and transformers again first.
    """
    child = os.fork()
    if not child:
        _run_tests(package, folder, told)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = told.read_text(encoding="utf-8")
    assert code == 0, text
    assert " passed" in text


def _run_tests(package: Path, folder: Path, told: Path) -> NoReturn:
    """Run the tests of a package and end this process with pytest's exit code."""
    code = 1
    try:
        with told.open("w", encoding="utf-8") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.path.insert(0, str(folder))
            sys.dont_write_bytecode = True
            os.chdir(package)
            for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
                os.environ.pop(name, None)
            code = int(
                pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(package), "tests"])
            )
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


def without_blank_lines(text: str) -> list[str]:
    """Lines that say something: how far apart two parts of a file stand is left to its formatter."""
    return [line for line in text.splitlines() if line.strip()]


def run(name: str, cli: Callable[..., Any]) -> int:
    """Run a document from top to bottom; returns how many blocks ran.

    Python blocks share one namespace. YAML blocks with `stages` are read as policies. Of sh blocks, the lines
    `dropflow ...` are run; others (`pip`, `pytest`, `make`) are not. A block titled `output` is what the block before
     it must print.
    """
    printed, ran = "", 0
    with _namespace(Path(name).stem) as module:
        for block in blocks(name):
            where = f"{name}:{block.line}"
            if block.title == "output":
                assert " ".join(printed.split()) == " ".join(block.text.split()), f"{where}: it printed\n{printed}"
            elif block.language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile("\n" * block.line + block.text, str(ROOT / name), "exec"), module.__dict__)
                printed = out.getvalue()
            elif block.language == "yaml" and "stages" in (content := yaml.safe_load(block.text)):
                dropflow.load_policy(content)
            elif block.language == "sh":
                printed = "".join(_call(cli, line, where) for line in block.text.splitlines())
            else:
                continue
            ran += 1
    return ran


def _call(cli: Callable[..., Any], line: str, where: str) -> str:
    words = shlex.split(line, comments=True)
    if not words or words[0] != "dropflow":
        return ""
    result = cli(*words[1:])
    assert result.exit_code == 0, f"{where}: `{line}` ended with {result.exit_code}: {result.output}"
    return str(result.stdout)


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[types.ModuleType]:
    """A module that classes of the document can be found in, as pydantic does."""
    module = types.ModuleType(f"document_{name.replace('-', '_')}")
    sys.modules[module.__name__] = module
    try:
        yield module
    finally:
        del sys.modules[module.__name__]

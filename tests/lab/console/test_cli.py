"""The command line as a whole: quick help, one line per fault, a traceback for bugs only."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

COMMANDS = ("run", "explain", "check", "list", "schema", "digits", "bench", "serve")


def test_help_imports_neither_torch_nor_the_engine() -> None:
    program = (
        "import sys\n"
        "from dropflow_lab.console.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print('imported:', sorted({'torch', 'transformers', 'dropflow', 'pydantic'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert all(f" {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("arguments", [("--version",), ("--version", "list", "stages")])
def test_the_version_is_that_of_the_package(cli, arguments) -> None:
    result = cli(*arguments)
    assert (result.exit_code, result.stdout) == (0, f"dropflow {version('dropflow')}\n")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "dropflow", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"dropflow {version('dropflow')}\n"
    wrong = subprocess.run([sys.executable, "-m", "dropflow", "chek"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "did you mean 'check'" in wrong.stderr.lower()


def test_without_a_command_the_help_is_shown(cli) -> None:
    result = cli()
    assert result.exit_code == 0
    assert all(f" {command} " in result.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        "digits train",
        "digits evaluate",
        "digits sample",
        "bench engine",
        "bench overlap",
        "bench decode",
        "bench compiled",
        "bench train",
        "bench gpu",
        "bench serve",
    ],
)
def test_every_command_has_help(cli, command) -> None:
    result = cli(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"dropflow {command}" in result.stdout or f"root {command}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("chek hidrop-64", "did you mean 'check'"),
        ("explain", "missing argument 'policy'"),
        ("explain hidrop-64 --layers many", "--layers"),
        ("explain hidrop-64 --layers 0", "--layers"),
        ("explain hidrop-64 --no-such-option", "--no-such-option"),
        ("list everything", "everything"),
        ("digits sample --out x --split secret", "secret"),
        ("digits", "missing command"),
        ("bench engine --repeats 1", "--repeats"),
        ("bench accuracy", "no such command 'accuracy'"),
    ],
)
def test_usage_errors_are_one_line_that_names_the_help(refused, arguments, expected) -> None:
    line = refused(*arguments.split())
    assert expected in line.lower()
    assert "--help)" in line


def test_a_bug_keeps_its_traceback(cli, monkeypatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dropflow_lab.explain.listing.stages", broken)
    assert isinstance(cli("list", "stages").exception, ZeroDivisionError)

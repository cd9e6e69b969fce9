"""A command line to call, and a tiny model folder for it to load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dropflow_lab.console.cli import app

Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Call `dropflow` with some arguments, in this process."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def refused(cli: Cli) -> Callable[..., str]:
    """Call `dropflow` with bad input; return the one line it printed on stderr."""

    def call(*arguments: object) -> str:
        result = cli(*arguments)
        assert isinstance(result.exception, SystemExit), result.exception
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    return call


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained LLaVA of four decoder layers and 144 visual tokens, and its processor."""
    from dropflow_lab.digits.checkpoints.model import build_model, export

    folder = tmp_path_factory.mktemp("model")
    export(build_model(decoder_layers=4), folder)
    return folder


@pytest.fixture
def mild(tmp_path: Path) -> Path:
    """A policy for `model_folder`: 144 tokens, 40 from layer 2, none from layer 3."""
    path = tmp_path / "mild.yaml"
    path.write_text(
        "tuned_for: {layers: 4, visual_tokens: 144}\n"
        "stages:\n"
        "  pyramid: {use: hidrop/concave-pyramid, keep: {2: 40}}\n"
        "  exit: {use: hidrop/early-exit, at: 3}\n"
    )
    return path

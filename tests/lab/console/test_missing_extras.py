"""Whatever needs an extra says so in one line, with the command that installs it; nothing is run before."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path

import pytest

import dropflow
from dropflow_lab.digits.data.glyphs import photos

LIBRARIES = {
    "digits": ("sklearn",),
    "figures": ("matplotlib",),
    "lmms": ("lmms_eval",),
    "serve": ("prometheus_client", "python_multipart", "starlette", "uvicorn"),
    "train": ("accelerate",),
    "tune": ("optuna",),
}
"""Extra -> the libraries that it brings and others do not."""
WITHOUT_CODE = {"dev", "docs", "flash"}
"""Extras that none of our code imports: tools of developers, the site, and kernels that transformers calls."""
COMMANDS = [
    ("digits", "compare --out {out}"),
    ("digits", "digits evaluate"),
    ("digits", "digits sample --out {out}"),
    ("digits", "digits train --out {out}"),
    ("digits", "profile --out {out}"),
    ("digits", "train --policy hidrop-digits --out {out}"),
    ("digits", "tune --budget average_tokens=40 --out {out}"),
    ("figures", "compare --data {data} --out {out}"),
    ("figures", "profile --data {data} --out {out}"),
    ("figures", "tune --budget average_tokens=40 --data {data} --out {out}"),
    ("serve", "bench serve"),
    ("serve", "serve"),
    ("train", "train --policy hidrop-digits --out {out}"),
    ("tune", "tune --budget average_tokens=40 --out {out}"),
]
"""Extra, and a command that cannot do without it."""


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hide the libraries of an extra, as if it were not installed."""

    def hide(extra: str) -> None:
        hidden = LIBRARIES[extra]
        for name in [name for name in sys.modules if name.split(".")[0] in hidden]:
            monkeypatch.delitem(sys.modules, name)
        for name in hidden:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def test_every_extra_is_looked_at() -> None:
    declared = set(metadata("dropflow").get_all("Provides-Extra") or ())
    assert declared == LIBRARIES.keys() | WITHOUT_CODE


@pytest.mark.parametrize(("extra", "command"), COMMANDS)
def test_a_command_names_the_extra_it_needs(
    extra: str,
    command: str,
    refused: Callable[..., str],
    without: Callable[[str], None],
    tmp_path: Path,
) -> None:
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (96, 96)).save(data / "a.png")
    (data / "data.jsonl").write_text('{"image": "a.png", "question": "what digit is yellow ?", "answer": "8"}\n' * 4)
    without(extra)
    said = refused(*command.format(data=data, out=tmp_path / "out").split())
    assert said.endswith(f": pip install 'dropflow[{extra}]'")
    assert not (tmp_path / "out").exists()


CALLS: dict[str, Callable[[], object]] = {
    "digits": photos.__wrapped__,
    "lmms": lambda: importlib.import_module("dropflow_lmms.model"),
}
"""Extra -> what raises in Python without it; `report().plot()` has a test where reports are tested."""


@pytest.mark.parametrize("extra", CALLS)
def test_python_names_the_extra_it_needs(extra: str, without: Callable[[str], None]) -> None:
    sys.modules.pop("dropflow_lmms.model", None)
    without(extra)
    message = re.escape(f": pip install 'dropflow[{extra}]'")
    with pytest.raises(dropflow.errors.MissingPackage, match=rf"^[^\n]*{message}$"):
        CALLS[extra]()

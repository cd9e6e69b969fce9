"""Tables at 80 columns and in a pipe: no value is cut."""

from __future__ import annotations

import pytest
from rich.table import Table

from dropflow_lab.console.commands.output import emit, one_line_each

COLUMNS = ("average visual tokens", "accuracy with its interval", "random pruning at the same average")
CELLS = ("114.71", "98.8% (95.6% .. 99.7%)", "97.5% (93.8% .. 99.0%)")


@pytest.fixture
def wide() -> Table:
    table = Table("policy", *COLUMNS, title="answers")
    table.add_row("a-policy-with-a-long-name", *CELLS)
    table.add_row("other", "144.00", "", "-")
    return table


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stdout counts as a terminal of 80 columns."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("terminal")
def test_a_wide_table_becomes_records_on_a_terminal(wide: Table, capsys: pytest.CaptureFixture[str]) -> None:
    emit({}, False, wide, "told")
    assert capsys.readouterr().out.splitlines() == [
        "answers",
        "",
        "policy: a-policy-with-a-long-name",
        *(f"{name}: {cell}" for name, cell in zip(COLUMNS, CELLS, strict=True)),
        "",
        "policy: other",
        "average visual tokens: 144.00",
        "random pruning at the same average: -",
        "",
        "told",
    ]


def test_a_wide_table_is_whole_in_a_pipe(
    wide: Table, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    emit({}, False, wide)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "a-policy" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["a-policy-with-a-long-name", *CELLS]


@pytest.mark.usefixtures("terminal")
def test_a_narrow_table_stays_one_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("layer", "tokens")
    table.add_row("0", "144")
    emit({}, False, table)
    assert "│ 0     │ 144    │" in capsys.readouterr().out


@pytest.mark.usefixtures("terminal")
def test_names_have_one_line_each_cut_at_a_word() -> None:
    long = "a visual token goes if neither the text as a whole nor any one text token attends to it"
    first, second = one_line_each({"family/stage-one": long, "other": "short"}).splitlines()
    assert first == "family/stage-one  a visual token goes if neither the text as a whole nor any …"
    assert len(first) <= 80
    assert second == "other             short"


def test_names_have_their_whole_text_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert one_line_each({"a": "word " * 30 + "end"}).endswith("word end")

"""The comparison in Markdown, and its numbers as they are shown."""

from __future__ import annotations

from dataclasses import replace

from dropflow_lab.compare import cells
from dropflow_lab.compare.cost import Cost, Parts, Times, Work
from dropflow_lab.compare.page import page
from dropflow_lab.compare.rows import Control, Row, Title
from dropflow_lab.measure.intervals import Gain, Share
from dropflow_lab.measure.timing import Spread

FULL, HALF = Share(1.0, 0.9, 1.0, 40), Share(0.5, 0.4, 0.6, 40)
WORK = Work(100.0, 100.0, 0.0, 10.0, 200.0, 240.0, 300.0)
ONE = Spread(1.0, 0.9, 1.1)
TIMES = Times(Spread(0.7, 0.6, 0.8), Spread(0.5, 0.4, 0.6), ONE, Parts(0.0503, 0.0204, 0.1305, 0.5, 0.7012))
COST = Cost(replace(WORK, flops_formula=25.0, kv_bytes=100.0, kv_bytes_end=60.0), WORK, TIMES, 2, 3)
KINDS = {"pos": HALF, "read": Share(0.25, 0.1, 0.4, 4)}


def dense(model: str) -> Row:
    return Row(Title("dense", model), 144, 144, 144, FULL, FULL, {"read": FULL}, None, "", replace(COST, work=WORK))


def pruned(title: Title, gain: Gain) -> Row:
    control = Control(72.0, HALF, HALF, gain, 1)
    return Row(title, 72.0, 40.0, 144.0, HALF, HALF, KINDS, control, "", COST)


ABOVE, LEVEL = Gain(0.2, 0.1, 0.3), Gain(0.0, -0.1, 0.1)
ROWS = [
    dense("one"),
    pruned(Title("p", "one", rescaled=True, also=("q",)), ABOVE),
    pruned(Title("p", "one", rescaled=True, persistent=True), LEVEL),
    dense("two"),
    pruned(Title("p", "two", rescaled=True, also=("q",)), Gain(-0.2, -0.3, -0.1)),
]


def test_one_table_says_who_is_above_random_on_which_model() -> None:
    lines = page(ROWS, {"x@one": "does not\nfit", "x@two": "does not\nfit"}, "40 questions.", ["read"]).splitlines()
    assert lines[:2] == ["40 questions.", ""]
    assert "- On `one`: 1 above, 1 level, 0 below." in lines
    assert "- On `two`: 0 above, 0 level, 1 below." in lines
    assert "| policy | average tokens | `one` | `two` |" in lines
    average = "72.0 (40.0 over the answer)"
    above, below = "**above** +20.0% (+10.0% .. +30.0%)", "below -20.0% (-30.0% .. -10.0%)"
    assert f"| `p`, `q` (rescaled) | {average} | {above} | {below} |" in lines
    assert f"| `p` (persistent, rescaled) | {average} | level +0.0% (-10.0% .. +10.0%) | - |" in lines
    assert lines[-2:] == ["", "- `x`: does not; fit"]


def test_a_table_for_each_model_has_the_numbers() -> None:
    text = page(ROWS, {}, "40 questions.", ["read"])
    assert text.count("### On `one`") == text.count("### On `two`") == 1
    own = text.partition("### On `one`")[2].partition("###")[0].splitlines()
    (line,) = [line for line in own if line.startswith("| `p`, `q`")]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == [
        "144.0",
        "50.0% (40.0% .. 60.0%)",
        "25.0%",
        "50.0% (40.0% .. 60.0%)",
        "+20.0% (+10.0% .. +30.0%) above",
        "25.0%",
        "50.0%",
        "25.0%",
        "0.50 (0.40 .. 0.60)",
        "0.70 (0.60 .. 0.80)",
    ]


def test_the_parts_that_are_shown_add_up_to_the_shown_sum() -> None:
    assert cells.parts(COST) == ["5.0%", "2.0%", "13.1%", "50.0%", "70.1%"]  # 5.03 + 2.04 + 13.05 + 50 = 70.12
    assert cells.parts(replace(COST, times=None)) == ["-"] * 5


def test_why_there_is_no_control_stands_in_the_row() -> None:
    row = replace(pruned(Title("p"), ABOVE), control=None, no_control="as many visual tokens as without a policy")
    assert (cells.control(row), cells.gain(row)) == ("-", "as many visual tokens as without a policy")
    assert "as many visual tokens as without a policy" in page([dense(""), row], {}, "", [])

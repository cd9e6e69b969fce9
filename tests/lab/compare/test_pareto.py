"""The Pareto front and its figure."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dropflow_lab.compare.figure import draw, pareto_front
from dropflow_lab.compare.rows import Control, Row
from dropflow_lab.measure.intervals import Mean

Points = st.lists(st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float)), min_size=1, max_size=12)


@given(Points)
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    beaten = [any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points) for cost, value in points]
    assert {points[place] for place in front} == {p for p, b in zip(points, beaten, strict=True) if not b}
    assert front == sorted(front, key=lambda place: points[place])


def test_the_figure_shows_every_policy(tmp_path: Path) -> None:
    share = Mean(0.5, 0.4, 0.6)
    control = Control(10.0, share, share, share, 1)
    rows = [
        Row("dense", 144.0, 144.0, Mean(1, 1, 1), Mean(1, 1, 1), {}, None, None),
        Row("some-policy", 10.0, 20.0, share, share, {}, control, None),
    ]
    png, svg = draw(rows, tmp_path)
    with Image.open(png) as image:
        assert image.size == (1080, 720)
    assert svg.read_text().count("<!-- some-policy -->") == 1
    assert "accuracy" in svg.read_text()

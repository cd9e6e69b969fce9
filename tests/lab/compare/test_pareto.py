"""The Pareto front and its figure."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dropflow_lab.compare.figure import draw, pareto_front
from dropflow_lab.compare.rows import Control, Row, Title
from dropflow_lab.measure.intervals import Gain, Share

Points = st.lists(st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float)), min_size=1, max_size=12)


@given(Points)
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    beaten = [any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points) for cost, value in points]
    assert {points[place] for place in front} == {p for p, b in zip(points, beaten, strict=True) if not b}
    assert front == sorted(front, key=lambda place: points[place])


def test_the_figure_shows_every_policy(tmp_path: Path) -> None:
    share, whole = Share(0.5, 0.4, 0.6, 100), Share(1, 0.96, 1, 100)
    control = Control(10.0, share, share, Gain(0.0, -0.1, 0.1), 1)
    rows = [
        Row(Title("dense"), 144.0, 144.0, 144.0, whole, whole, {}, None, "", None),
        Row(Title("some-policy", rescaled=True), 10.0, 10.0, 20.0, share, share, {}, control, "", None),
    ]
    png, svg = draw(rows, tmp_path)
    with Image.open(png) as image:
        assert image.size == (1080, 720)
    assert svg.read_text().count("<!-- some-policy -->") == 1
    assert "accuracy" in svg.read_text()


def test_the_figure_has_a_panel_per_model(tmp_path: Path) -> None:
    share = Share(0.5, 0.4, 0.6, 100)
    rows = [
        Row(Title("dense", model), 144.0, 144.0, 144.0, share, share, {}, None, "", None) for model in ("one", "two")
    ]
    png, svg = draw(rows, tmp_path)
    with Image.open(png) as image:
        assert image.size == (1080, 1440)
    assert all(f"<!-- {model} -->" in svg.read_text() for model in ("one", "two"))

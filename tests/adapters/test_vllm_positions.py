"""Persistent positions in vLLM are those of the whole prompt, however it is divided into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dropflow_vllm.positions import COLUMNS, LARGEST, Span, check_spans, first_positions, marked, unmarked, with_rows

Part = tuple[int, tuple[int, int], list[bool]]
"""Text tokens before an image, its grid, and which of its patches stay."""


def whole(parts: Sequence[Part], last: int, *, grids: bool) -> tuple[Tensor, Tensor, int]:
    """Positions (3, tokens) of the tokens that stay, which of them are patches, and the next position.

    Counted along the whole prompt: an image takes up its larger side, or without `grids` as many as it has patches.
    """
    columns: list[tuple[int, int, int]] = []
    visual: list[bool] = []
    position = 0
    for text, (rows, width), stays in parts:
        columns += [(position + i,) * 3 for i in range(text)]
        visual += [False] * text
        position += text
        for patch, stay in enumerate(stays):
            if stay:
                offset = (0, patch // width, patch % width) if grids else (patch,) * 3
                columns.append((position + offset[0], position + offset[1], position + offset[2]))
                visual.append(True)
        position += max(rows, width) if grids else rows * width
    columns += [(position + i,) * 3 for i in range(last)]
    return torch.tensor(columns).T, torch.tensor(visual + [False] * last), position + last


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[Part], int]:
    parts = []
    for number in range(draw(st.integers(1, 3))):
        rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        stays = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width).filter(any))
        parts.append((draw(st.integers(min(number, 1), 4)), (rows, width), stays))
    return parts, draw(st.integers(1, 5))


@settings(deadline=None, max_examples=80)
@given(prompts(), st.booleans(), st.lists(st.integers(1, 12), min_size=1, max_size=6), st.booleans())
def test_positions_are_those_of_the_whole_prompt(
    asked: tuple[list[Part], int], grids: bool, pieces: list[int], again: bool
) -> None:
    parts, last = asked
    expected, visual, after = whole(parts, last, grids=grids)
    spans, embeddings, offset = [], [], 0
    for text, (rows, width), stays in parts:
        places = torch.tensor(stays).nonzero()[:, 0]
        advance = max(rows, width) if grids else rows * width
        spans.append(Span(offset + text, len(places), advance))
        embeddings.append(marked(torch.zeros(len(places), 4), places, width if grids else None))
        offset += text + len(places)
    length = offset + last
    positions, delta = first_positions(length, spans)
    assert torch.equal(positions[:, ~visual], expected[:, ~visual])
    assert delta == after - length
    ends = [end for end in accumulate(pieces) if end < length]
    rounds = [(0, length)] if not ends else list(zip([0, *ends], [*ends, length], strict=True))
    for start, end in rounds + rounds[:1] * again:  # a preempted prompt starts again
        here = []
        for span, rows in zip(spans, embeddings, strict=True):
            taken = rows[max(start - span.offset, 0) : max(end - span.offset, 0)]
            here += [unmarked(taken)[1]] if len(taken) else []
        positions, delta = with_rows(positions, visual, here, start)
        assert torch.equal(positions[:, start:end], expected[:, start:end])
        assert delta == after - length
    assert torch.equal(positions, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_survive_low_precision(dtype: torch.dtype) -> None:
    places = torch.arange(0, LARGEST, 37)
    rows = torch.randn(len(places), 3).to(dtype)
    held = marked(rows, places, None)
    assert held.dtype == dtype
    assert held.shape == (len(places), 3 + COLUMNS)
    plain, numbers = unmarked(held)
    assert torch.equal(plain, rows)
    assert torch.equal(numbers, torch.stack((places, places, places, torch.arange(len(places)))))
    with pytest.raises(ValueError, match="more than 16384 patches"):
        marked(rows[:1], torch.tensor([LARGEST + 1]), None)


def test_prompts_without_images_are_numbered_on() -> None:
    positions, delta = first_positions(5, [])
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert delta == 0
    assert with_rows(positions, torch.zeros(5, dtype=torch.bool), [], 0)[1] == 0


def test_prompts_whose_positions_cannot_be_told() -> None:
    check_spans(9, [Span(1, 3, 16), Span(5, 3, 16)], longest=100, table=126)
    with pytest.raises(ValueError, match="an image is followed by no text"):
        check_spans(9, [Span(1, 3, 16), Span(4, 3, 16)], longest=100, table=126)
    with pytest.raises(ValueError, match="an image is followed by no text"):
        check_spans(8, [Span(1, 3, 16), Span(5, 3, 16)], longest=100, table=126)
    with pytest.raises(ValueError, match=r"26 positions .* end at position 126, but the model can rotate by 125"):
        check_spans(9, [Span(1, 3, 16), Span(5, 3, 16)], longest=100, table=125)

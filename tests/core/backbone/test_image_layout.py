"""Which rows of an image are patches, which line each row belongs to, and how the flags of several images join."""

from __future__ import annotations

import pytest
import torch

from dropflow.backbone.image_layout import EXTRA, IMAGE, KEPT, LINE, ImageLayout, flags
from dropflow.engine.tokens.prompt import join_flags, make_prompt
from dropflow.errors import UnsupportedModel

CPU = torch.device("cpu")
NEWLINES = ImageLayout(8, (2, 3), line_ends=True)
CLS = ImageLayout(5, (2, 2), head=1)
ENDED = ImageLayout(5, (2, 2), tail=1)


@pytest.mark.parametrize(
    ("layout", "extra", "line"),
    [
        (ImageLayout(4, (2, 2)), [0, 0, 0, 0], [0, 0, 0, 0]),
        (NEWLINES, [0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]),
        (CLS, [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        (ENDED, [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]),
        (ImageLayout(7, (2, 2), head=1, line_ends=True), [1, 0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_extra_rows_and_their_lines(layout: ImageLayout, extra: list[int], line: list[int]) -> None:
    assert layout.extra(CPU).int().tolist() == extra
    assert layout.line(CPU).tolist() == line
    assert layout.patches == extra.count(0)


def test_extra_rows_stay_with_the_last_patch_of_their_line() -> None:
    keep = NEWLINES.keep_of(torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.bool))
    assert keep.int().tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert ImageLayout(0, (0, 16), line_ends=True).keep_of(torch.zeros(0, dtype=torch.bool)).shape == (0,)
    assert CLS.keep_of(torch.zeros(4, dtype=torch.bool)).int().tolist() == [0] * 5
    assert ENDED.keep_of(torch.tensor([0, 0, 1, 0], dtype=torch.bool)).int().tolist() == [0, 0, 1, 0, 1]


def test_images_of_two_modalities_are_numbered_on() -> None:
    ids = torch.tensor([[7, 8, 8, 9, 9], [8, 7, 9, 9, 7]])
    tables = {
        "image": flags([ImageLayout(2), ImageLayout(1)], 0, CPU),
        "video": flags([ImageLayout(2), ImageLayout(2)], 0, CPU),
    }
    joined = join_flags({"image": ids == 8, "video": ids == 9}, tables)
    assert joined is not None
    assert joined[:, IMAGE].tolist() == [0, 0, 2, 2, 1, 3, 3]
    assert joined[:, KEPT].tolist() == [1.0] * 7
    assert join_flags({"image": ids == 8, "video": ids == 9}, {"image": tables["image"]}) is None
    with pytest.raises(UnsupportedModel, match=r"4 image placeholders by the adapter's token ids, but .* 3 rows"):
        join_flags({"image": ids == 9}, tables)


def test_a_prompt_tells_patches_from_newlines() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    table = flags([NEWLINES], 0, CPU)
    assert table[:, EXTRA].sum() == 2
    assert table[:, LINE].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    asks = (torch.tensor([[9]]), torch.tensor([[True]]))
    prompt = make_prompt(visual, table, torch.ones_like(visual), asks, None)
    assert prompt.scored.tolist() == [[-1, 0, 0, 0, -1, 0, 0, 0, -1, -1]]
    assert prompt.image_id.tolist() == [[-1, 0, 0, 0, 0, 0, 0, 0, 0, -1]]
    assert prompt.image_sizes == (6,)
    want = torch.tensor([[1, 0, 0, 0, 1, 0, 1, 0, 1, 1]], dtype=torch.bool)
    assert prompt.without_widows(want).int().tolist() == [[1, 0, 0, 0, 0, 0, 1, 0, 1, 1]]


def test_without_features_images_are_runs_or_of_fixed_size_numbered_over_the_batch() -> None:
    visual = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    asks = (torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.bool))
    runs = make_prompt(visual, None, torch.ones_like(visual), asks, None)
    assert runs.image_id.tolist() == [[0, 0, -1, 1, 1], [-1] * 5, [-1, 2, 2, 2, 2]]
    fixed = make_prompt(visual, None, torch.ones_like(visual), asks, 2)
    assert fixed.image_id.tolist() == [[0, 0, -1, 1, 1], [-1] * 5, [-1, 2, 2, 3, 3]]
    assert fixed.image_sizes == (2, 2, 2, 2)

"""Which rows of an image are patches, which line each row belongs to, and how the flags of several images join."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dropflow.backbone.image_layout import ImageLayout
from dropflow.engine.tokens.prompt import Prompt, VisualTokens, make_prompt
from dropflow.engine.tokens.row_flags import RowFlags
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


def test_every_patch_knows_its_row() -> None:
    for layout in (ImageLayout(4, (2, 2)), NEWLINES, CLS, ENDED, ImageLayout(7, (2, 2), head=1, line_ends=True)):
        assert layout.patch_rows(CPU).tolist() == (~layout.extra(CPU)).nonzero()[:, 0].tolist()
        assert layout.lines == int(layout.line(CPU).max()) + 1


def test_flags_are_packed_for_the_way_through_transformers() -> None:
    kept = [torch.tensor([True, False, True, True, False, True]), torch.tensor([False] * 4)]
    carried = [torch.arange(12.0).view(6, 2), torch.full((4, 2), 7.0)]
    tower = [torch.tensor([1.0, 0.0, 1.0, 1.0, 0.25, 1.0]), torch.zeros(4)]
    flags = RowFlags.of([NEWLINES, CLS], 3, 11, CPU, kept, [~kept[0], ~kept[1]], carried, tower)
    assert (len(flags), flags.images, flags.lines, flags.plan) == (13, 5, 2, 11)
    assert flags.kept.int().tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0]
    assert flags.image.tolist() == [3] * 8 + [4] * 5
    assert flags.carried[[0, 3, 4, 8, 9]].tolist() == [[0, 1], [0, 0], [6, 7], [0, 0], [7, 7]]
    whole = replace(flags, images=8)
    for read in (RowFlags.unpack(flags.pack(whole)), RowFlags.unpack(flags.pack(whole), whole)):
        assert (read.images, read.lines, read.plan) == (8, 2, 11)
        assert read.tower.tolist() == [1, 0, 1, 1, 1, 0.25, 1, 1, 1, 0, 0, 0, 0]
        for name in ("kept", "protected", "image", "line", "extra", "carried", "tower", "video", "owner"):
            assert torch.equal(getattr(read, name), getattr(flags, name)), name
    assert len(RowFlags.unpack(flags.pack(whole)[:0])) == 0


def test_rows_that_close_an_entry_stay_with_its_last_patch() -> None:
    frame, last = ImageLayout(4, (2, 2)), replace(ENDED, closes=True)
    none, one = torch.zeros(4, dtype=torch.bool), torch.tensor([0, 0, 1, 0], dtype=torch.bool)
    for kept, stays in (([one, none], True), ([none, one], True), ([none, none], False)):
        flags = RowFlags.of([frame, last], 3, 11, CPU, kept)
        assert bool(flags.kept[-1]) == stays
        assert flags.kept[:8].tolist() == torch.cat(kept).tolist()
        assert flags.owner.tolist() == [4] * 9
    assert RowFlags.of([frame, ENDED], 3, 11, CPU, [one, none]).owner.tolist() == [3] * 4 + [4] * 5


def test_mixed_precision_does_not_round_packed_flags() -> None:
    """FSDP2, for one, casts whatever floating-point tensors a module is given or returns."""
    carried = torch.tensor([[0.1, 3e38], [-1e-30, 257.0]])
    flags = RowFlags.of([ImageLayout(2)], 1000, 100_001, CPU, carried=[carried])
    table = flags.pack(flags)
    read = RowFlags.unpack(table.bfloat16() if table.is_floating_point() else table)
    assert (read.images, read.plan) == (1001, 100_001)
    assert read.image.tolist() == [1000, 1000]
    assert torch.equal(read.carried, carried)


def placed(masks: dict[str, torch.Tensor], flags: dict[str, RowFlags] | None, fixed: int | None = None) -> Prompt:
    visual = VisualTokens.found(masks)
    assert visual is not None
    batch = len(visual.mask)
    asks = (torch.zeros(batch, 1, dtype=torch.long), torch.ones(batch, 1, dtype=torch.bool))
    return make_prompt(visual, flags and visual.rows(flags), torch.ones_like(visual.mask), asks, fixed)


def test_images_of_two_modalities_are_numbered_on() -> None:
    ids = torch.tensor([[7, 8, 8, 9, 9], [8, 7, 9, 9, 7]])
    masks = {"image": ids == 8, "video": ids == 9}
    flags = {
        "image": RowFlags.of([ImageLayout(2), ImageLayout(1)], 0, 1, CPU),
        "video": RowFlags.of([ImageLayout(2), ImageLayout(2)], 0, 1, CPU),
    }
    prompt = placed(masks, flags)
    assert prompt.image_id.tolist() == [[-1, 0, 0, 2, 2], [1, -1, 3, 3, -1]]
    assert prompt.image_sizes == (2, 1, 2, 2)
    assert prompt.patches.tolist() == [2, 1, 2, 2]
    visual = VisualTokens.found(masks)
    assert visual is not None
    assert visual.rows({"image": flags["image"]}) is None
    nines = VisualTokens.found({"image": ids == 9})
    assert nines is not None
    with pytest.raises(UnsupportedModel, match=r"4 image placeholders by the adapter's token ids, but .* 3 rows"):
        nines.rows(flags)
    assert VisualTokens.found({"image": ids == 5}) is None


def test_a_prompt_tells_patches_from_newlines() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    flags = RowFlags.of([NEWLINES], 0, 1, CPU)
    assert flags.extra.sum() == 2
    assert flags.line.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    prompt = placed({"image": visual}, {"image": flags})
    assert prompt.scored.tolist() == [[-1, 0, 0, 0, -1, 0, 0, 0, -1, -1]]
    assert prompt.image_id.tolist() == [[-1, 0, 0, 0, 0, 0, 0, 0, 0, -1]]
    assert prompt.image_sizes == (6,)
    live = torch.tensor([[1, 0, 0, 0, 1, 0, 1, 0, 1, 1]], dtype=torch.bool)
    assert prompt.without_widows(live).int().tolist() == [[1, 0, 0, 0, 0, 0, 1, 0, 1, 1]]
    assert prompt.extents["present"] == (10, 10, 10)
    assert prompt.extents["after"].high == 1


def test_without_features_images_are_runs_or_of_fixed_size_numbered_over_the_batch() -> None:
    visual = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    runs = placed({"image": visual}, None)
    assert runs.image_id.tolist() == [[0, 0, -1, 1, 1], [-1] * 5, [-1, 2, 2, 2, 2]]
    fixed = placed({"image": visual}, None, 2)
    assert fixed.image_id.tolist() == [[0, 0, -1, 1, 1], [-1] * 5, [-1, 2, 2, 3, 3]]
    assert fixed.image_sizes == (2, 2, 2, 2)

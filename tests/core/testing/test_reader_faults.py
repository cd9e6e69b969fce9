"""The kit finds tables of a `reader` that are wrong, without any knowledge of the family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dropflow import Backbone, VisionReader
from dropflow.testing import BrokenGuarantee, check_reader, tiny_models
from dropflow.testing.case import Case
from dropflow.testing.families.tiny import SAMPLES
from dropflow.testing.kit import VIDEO_SAMPLES

Change = Callable[[Backbone, VisionReader, str], VisionReader]


def tables(change: Callable[[list[Tensor]], list[Tensor]]) -> Change:
    """A reader whose tables are changed."""
    return lambda _, reader, __: replace(reader, members=lambda *given: change(reader.members(*given)))


flipped = tables(lambda own: [table.flip(0) for table in own])


def raster(_: Backbone, reader: VisionReader, __: str) -> VisionReader:
    """Qwen2.5-VL without its window order, as if it were Qwen2-VL."""

    def members(sizes: Any, *_: Any) -> list[Tensor]:
        return list(torch.arange(4 * sum(sizes)).view(-1, 4).split(list(sizes)))

    return replace(reader, members=members)


def one_picture(_: Backbone, reader: VisionReader, __: str) -> VisionReader:
    """All pictures of a call as one."""
    pictures = reader.pictures
    assert pictures is not None
    return replace(reader, pictures=lambda arguments: [sum(pictures(arguments))])


FAULTS: dict[str, tuple[str, Change, str]] = {
    "no window order": ("qwen2_5_vl", raster, r"row \d+ of the features is made of the tower's rows \[.*it says \["),
    "the CLS row forgotten": (
        "internvl",
        tables(lambda own: [table - 1 for table in own]),
        r"row 0 of the features is made of the tower's rows \[1, 2, 7, 8\], it says \[0, 1, 6, 7\]",
    ),
    "rows instead of blocks": (
        "gemma3",
        tables(lambda own: [torch.arange(len(own) * 64).view(len(own), 16, 4)[i] for i in range(len(own))]),
        r"row 0 of the features is made of the tower's rows \[0, 1, 8, 9\], it says \[0, 1, 2, 3\]",
    ),
    "a newline made of a patch": (
        "llava_next",
        tables(lambda own: [table.clamp(min=0) for table in own]),
        r"is made of the tower's rows \[\], it says \[0\]",
    ),
    "too few rows": (
        "idefics3",
        tables(lambda own: [table[:-1] for table in own]),
        r"states \d+ rows, the features have \d+",
    ),
    "no prefix": (
        "llava",
        lambda _, reader, __: replace(reader, prefix=0),
        r"received_attention\(0\) of image 0 is .* off the mean of its whole maps",
    ),
    "pictures run together": ("mistral3", one_picture, r"rows that attend to each other are not those of one of the"),
    "padding forgotten": (
        "lfm2_vl",
        lambda _, reader, __: replace(reader, pictures=lambda arguments: [48] * len(arguments["pixel_values"])),
        r"`pictures` has \[48(, 48)*\] rows, but a row attends to \[32",
    ),
    "time steps run together": (
        "qwen3_vl",
        lambda b, reader, m: one_picture(b, reader, m) if m == "video" else reader,
        r"wrong for videos: the rows that attend to each other are not those of one of the `pictures` \[96\]",
    ),
    "frames from bottom to top": (
        "llava_next_video",
        lambda b, reader, m: flipped(b, reader, m) if m == "video" else reader,
        r"wrong for videos: row \d+ of the features is made of",
    ),
}


@pytest.mark.parametrize(("family", "change", "message"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_reader_is_found(family: str, change: Change, message: str) -> None:
    adapter, tiny = tiny_models()[family]

    def changed(self: Backbone, modality: str = "image") -> VisionReader:
        reader = adapter(self.model).reader(modality)
        assert reader is not None
        return change(self, reader, modality)

    wrong = type("Wrong", (adapter,), {"reader": changed})
    samples = VIDEO_SAMPLES if "video" in tiny.pictures else SAMPLES
    check_reader(Case(family, adapter, tiny, {}, samples=samples))
    with pytest.raises(BrokenGuarantee, match=message):
        check_reader(Case(family, wrong, tiny, {}, samples=samples))

"""Numbers `encode` attaches to a patch reach `prune` of the same stage, whatever happens to its row in between."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import pytest
import torch
from tiny import CHUNKS_IMAGES, IMAGE, policy, prompt, tiny_llava

import dropflow
from dropflow import Encode, EncodeCall, Keep, PruneCall, Stage, hookimpl
from dropflow.errors import DecisionError, UnsupportedCall
from dropflow.testing import tiny_models

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


class Numbered(Stage[Any]):
    """Each patch carries 100 x image + place, and place squared; records what arrives."""

    width: ClassVar[int] = 2
    seen: ClassVar[list[PruneCall]] = []

    @property
    def carries(self) -> int:
        return self.width

    @property
    def prune_at(self) -> tuple[int, ...]:
        return (0, 3)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        columns = (torch.stack((100 * image + p, p**2), 1).float() for image, p in enumerate(call.places))
        return Encode(carry=tuple(columns))

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        self.seen.append(call)
        return Keep(torch.ones_like(call.valid))


class Other(Numbered):
    """One column, the place counted from the end."""

    width = 1
    seen: ClassVar[list[PruneCall]] = []

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        return Encode(carry=tuple((15 - p)[:, None].float() for p in call.places))


class Thin(Stage[Any]):
    """Drops every third row, and replaces the next two by their mean at the place of the second."""

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        rows = tuple(torch.stack([f[i : i + 2].mean(0) for i in range(1, 16, 3)]) for f in call.features)
        return Encode(rows=rows, places=tuple(p[2::3] for p in call.places))


@pytest.fixture(autouse=True)
def _forget() -> None:
    Numbered.seen.clear()
    Other.seen.clear()


def check(calls: list[PruneCall], offset: int = 0) -> None:
    """Check that every patch has the numbers given to its place, and text has zeros."""
    assert calls
    for call in calls:
        assert call.carried is not None
        assert call.carried.shape == (*call.index.shape, 2)
        for sample in range(len(call.index)):
            for slot in range(call.index.shape[1]):
                image, token = int(call.image_id[sample, slot]), int(call.index[sample, slot])
                got = call.carried[sample, slot].tolist()
                if image >= 0:
                    place = token + offset - FIRST[image]
                    assert got == [100 * image + place, place**2]
                elif call.text[sample, slot]:
                    assert got == [0, 0]


INPUTS = prompt()
FIRST = [int((INPUTS["input_ids"][sample] == IMAGE).nonzero()[patch, 0]) for sample, patch in ((0, 0), (1, 0), (1, 16))]
"""Logical index of the first patch of each image."""


@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 1, "prefill_chunk_size": 17} if CHUNKS_IMAGES else {}], ids=["whole", "in chunks"]
)
@torch.no_grad()
def test_patches_carry_what_they_were_given(mode: dict[str, Any]) -> None:
    model = tiny_llava()
    keeps = {"use": "hidrop/concave-pyramid", "keep": {2: 7}}
    with dropflow.attach(model, policy(carry={"use": Numbered}, other={"use": Other}, keeps=keeps)):
        model.generate(**INPUTS, **GREEDY, **mode)
    if not mode:
        check(Numbered.seen)
        counts = [[int((call.image_id == image).sum()) for image in range(3)] for call in Numbered.seen]
        assert counts == [[16, 16, 16], [7, 7, 7]]
    got = set()
    for call in Other.seen:
        assert call.carried is not None
        patch = call.image_id >= 0
        got |= set(zip(call.image_id[patch].tolist(), call.carried[patch][:, 0].tolist(), strict=True))
    assert got == {(image, place) for image in range(3) for place in range(16)}


@torch.no_grad()
def test_rows_that_others_thin_out_and_merge_go_on_carrying() -> None:
    model = tiny_llava()
    with dropflow.attach(model, policy(carry={"use": Numbered}, thin={"use": Thin})):
        model(**INPUTS)
    check(Numbered.seen)
    assert [int((Numbered.seen[0].image_id == image).sum()) for image in range(3)] == [5, 5, 5]


@torch.no_grad()
def test_beams_and_a_carrying_stage_give_the_tokens_of_the_plain_model() -> None:
    model = tiny_llava()
    plain = model.generate(**INPUTS, **GREEDY, num_beams=2)
    with dropflow.attach(model, policy(carry={"use": Numbered})):
        assert torch.equal(model.generate(**INPUTS, **GREEDY, num_beams=2), plain)
    call = Numbered.seen[0]
    assert call.carried is not None
    assert torch.equal(call.carried[0], call.carried[1])
    images = [sorted(set(row.tolist()) - {-1}) for row in call.image_id]  # copies of a sample share no image number
    assert images == [[0], [3], [1, 2], [4, 5], [], []]
    assert call.image_sizes == (16,) * 6


def test_what_does_not_fit_is_named() -> None:
    model = tiny_llava()

    class Wide(Numbered):
        width = 3

    class Silent(Numbered):
        width = 0

    for stage, expected in ((Wide, r"\(16, 3\)"), (Silent, r"\(16, 0\)")):
        told = rf"stages.carry: .*\(16, 2\) to carry for image 0.*{expected}"
        with dropflow.attach(model, policy(carry={"use": stage})), pytest.raises(DecisionError, match=told):
            model(**INPUTS)


class Reader(Numbered):
    """Reads the questions."""

    width = 0
    seen: ClassVar[list[PruneCall]] = []
    encode_at = ()

    @property
    def reads_questions(self) -> bool:
        return True


def test_questions_are_one_per_sample_and_the_copies_of_a_sample_share_its() -> None:
    model, ask = tiny_llava(), ["a", "b", "c"]
    with dropflow.attach(model, policy(read={"use": Reader})):
        with dropflow.questions(ask):
            model.generate(**INPUTS, **GREEDY, num_beams=2)
        with dropflow.questions(["all"]), pytest.raises(UnsupportedCall, match="1 stated for a batch of 3 different"):
            model(**INPUTS)
        assert {call.questions for call in Reader.seen} == {("a", "a", "b", "b", "c", "c")}
        model(INPUTS["input_ids"][2:])  # without an image no stage is asked
        failed: list[Exception] = []

        def run() -> None:
            try:
                model(**INPUTS)
            except UnsupportedCall as error:
                failed.append(error)

        with dropflow.questions(ask):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert "questions: none stated" in str(failed[0])
    Reader.seen.clear()


@torch.no_grad()
def test_a_picture_without_tiles_of_its_own_carries_nothing() -> None:
    """Idefics3 fills up samples that have fewer tiles than others with empty entries of the features."""

    class Tiles(Numbered):
        seen: ClassVar[list[PruneCall]] = []

    _, tiny = tiny_models()["idefics3"]
    model, (inputs, shown) = tiny.model(), tiny.prompt(((3, "I", 5), (1, "I", 2, "I", 5), (4,)))
    with dropflow.attach(model, policy(n={"use": Tiles})):
        model(**inputs)
    (call, _), sizes = Tiles.seen, [len(layout.layouts) for own in shown for layout in own]
    assert sizes == [1, 2, 1]
    assert call.carried is not None
    for image in range(4):
        own = call.carried[call.image_id == image]
        assert torch.equal(own[:, 0] - own[0, 0], torch.arange(9.0))
        assert torch.equal(own[:, 1], torch.arange(9.0) ** 2)

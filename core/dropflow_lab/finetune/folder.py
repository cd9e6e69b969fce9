"""The questions of a data folder as training samples: those about the same picture follow it together."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from dropflow_lab.digits.data.dialogues import Dialogue
from dropflow_lab.errors import InputError, shortened
from dropflow_lab.inputs.data import Picture, Sample


class FolderDialogues(Dataset[Dialogue]):
    """Dialogues of up to `rounds` questions about the same picture, in the order of the samples.

    Pictures are opened on access. Raises `InputError` for samples without an answer, or with several pictures.
    """

    def __init__(self, samples: Sequence[Sample], rounds: int) -> None:
        asked: dict[str, tuple[Picture, list[tuple[str, str]]]] = {}
        for sample in samples:
            if len(sample.pictures) != 1 or sample.answer is None:
                found = f"{len(sample.pictures)} images" if sample.answer is not None else "no answer"
                raise InputError(
                    f"--data: {sample.where}: expected one image and an answer in every line, found {found} where "
                    f"{shortened(repr(sample.question))} is asked"
                )
            (picture,) = sample.pictures
            asked.setdefault(picture.name, (picture, []))[1].append((sample.question, sample.answer))
        self._items = [
            (picture, tuple(own[start : start + rounds]))
            for picture, own in asked.values()
            for start in range(0, len(own), rounds)
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Dialogue:
        picture, rounds = self._items[index]
        return Dialogue(picture.open(), rounds)

"""The questions of a data folder as training samples: those about the same pictures follow them together."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from dropflow_lab.digits.data.dialogues import Dialogue
from dropflow_lab.errors import InputError, shortened
from dropflow_lab.inputs.data import Picture, Sample


class FolderDialogues(Dataset[Dialogue]):
    """Dialogues of up to `rounds` questions about the same pictures, in the order of the samples.

    Pictures are opened on access. Raises `InputError` for samples without an answer.
    """

    def __init__(self, samples: Sequence[Sample], rounds: int) -> None:
        asked: dict[tuple[str, ...], tuple[tuple[Picture, ...], list[tuple[str, str]]]] = {}
        for sample in samples:
            if sample.answer is None:
                raise InputError(
                    f"--data: {sample.where}: expected an answer in every line, found none where "
                    f"{shortened(repr(sample.question))} is asked"
                )
            names = tuple(picture.name for picture in sample.pictures)
            asked.setdefault(names, (sample.pictures, []))[1].append((sample.question, sample.answer))
        self._items = [
            (pictures, tuple(own[start : start + rounds]))
            for pictures, own in asked.values()
            for start in range(0, len(own), rounds)
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Dialogue:
        pictures, rounds = self._items[index]
        return Dialogue(tuple(picture.open() for picture in pictures), rounds)

"""The samples of a stage in the order in which they are trained on, whatever the number of processes."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from dropflow_lab.digits.data.dialogues import Dialogue


class Epochs(Dataset[Dialogue]):
    """`total` samples of `data`: all of it in a random order, then in another one, and so on.

    Sample `index` depends on `seed` and `index` alone, so a resumed run continues with the samples that an
    uninterrupted one would see, and step `n` of a batch of `b` trains on the samples from `n * b` on, on one rank or on
    several.
    """

    def __init__(self, data: Dataset[Dialogue], total: int, seed: int) -> None:
        self._data, self._total, self._seed = data, total, seed
        self._size = len(data)  # type: ignore[arg-type]  # Dataset has no length
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> Dialogue:
        if not 0 <= index < self._total:
            raise IndexError(f"expected an index of 0..{self._total - 1}, got {index}")
        epoch, place = divmod(index, self._size)
        if epoch not in self._orders:
            dice = torch.Generator().manual_seed(self._seed + epoch)  # as accelerate draws orders
            self._orders = {epoch: torch.randperm(self._size, generator=dice).tolist()}
        return self._data[self._orders[epoch][place]]

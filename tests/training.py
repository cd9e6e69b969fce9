"""A data set of tiny prompts, a collator that keeps pictures and prompts together, and trainers over both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import BOS, IMAGE, PAD, Parts
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

SAMPLES: Sequence[Parts] = (
    (3, "I", 9),
    ("I", 2, "I", 12),
    (8,),
    (1, "I", 6),
    (5, "I", 4),
    (2, "I", 7),
    (3, "I", 3),
    (6,),
)
"""One image, two images, none; every sample ends in an answer of two to four tokens."""


class Prompts(Dataset[dict[str, Any]]):
    """The samples, with labels on their last tokens."""

    def __init__(self, samples: Sequence[Parts] = SAMPLES, *, grid: int = 4, seed: int = 1) -> None:
        dice = torch.Generator().manual_seed(seed)
        self._rows = [_sample(number, parts, grid, dice) for number, parts in enumerate(samples)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def _sample(number: int, parts: Parts, grid: int, dice: torch.Generator) -> dict[str, Any]:
    ids, images = [BOS], 0
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 97, (part,), generator=dice).tolist()
        else:
            ids, images = ids + [IMAGE] * grid**2, images + 1
    answer = 2 + number % 3
    pixels = torch.randn(images, 3, 6 * grid, 6 * grid, generator=dice)
    return {"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:], "pixel_values": pixels}


def collate(samples: Sequence[dict[str, Any]], side: str = "right") -> dict[str, Any]:
    """Pad prompts to one length; pictures of all samples follow each other."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [(sample[name], [value] * (longest - len(sample[name]))) for sample in samples]
        return torch.tensor([pad + row if side == "left" else row + pad for row, pad in rows])

    batch = {"input_ids": padded("input_ids", PAD), "labels": padded("labels", -100)}
    batch["attention_mask"] = (batch["input_ids"] != PAD).long()
    pixels = torch.cat([sample["pixel_values"] for sample in samples])
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


class Losses(TrainerCallback):  # type: ignore[misc]  # transformers leaves it untyped
    """Keeps every logged loss."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.eval: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        for name, kept in (("loss", self.train), ("eval_loss", self.eval)):
            if name in (logs or {}):
                kept.append(logs[name])


def freeze_tower(model: Any) -> Any:
    """As LLaVA is trained; its last layers, after `vision_feature_layer`, would have no gradient."""
    for name, weight in model.named_parameters():
        weight.requires_grad_("vision_tower" not in name)
    return model


def trainer(model: Any, folder: Path, **arguments: Any) -> tuple[Trainer, Losses]:
    """Four steps over batches of four, in order, by plain SGD, each step's loss logged."""
    chosen = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    losses = Losses()
    made = Trainer(
        model=model,
        args=TrainingArguments(str(folder), **(chosen | arguments)),
        train_dataset=Prompts(),
        eval_dataset=Prompts(seed=2),
        data_collator=collate,
        callbacks=[losses],
    )
    return made, losses

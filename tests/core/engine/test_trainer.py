"""`transformers.Trainer` trains under a policy with the same losses as a plain loop over the masked run."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDROP, tiny_llava
from training import Prompts, collate, freeze_tower, trainer
from transformers import AutoModelForImageTextToText

import dropflow
from dropflow.testing import MaskedOracle

STEPS = 4
DATA = Prompts()
BATCHES = [[DATA[i] for i in rows] for rows in ((0, 1, 2, 3), (4, 5, 6, 7)) * 2]


@pytest.fixture(autouse=True)
def _newer_names() -> Any:
    """transformers 5.23 renames gradient checkpointing; 5.20 and PEFT know only the old name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def masked_losses(side: str = "right") -> list[float]:
    """A hand-written training loop in which dropped tokens are masked instead of removed."""
    model = freeze_tower(tiny_llava()).train()
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.05)
    losses = []
    for rows in BATCHES:
        batch = collate(rows, side)
        with torch.no_grad(), dropflow.attach(model, HIDROP) as flow:
            model(**batch)
        with MaskedOracle(model, flow.live()):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return masked_losses()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "accumulated", "reentrant", "non-reentrant"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the frozen tower under reentrant
def test_losses_are_those_of_the_masked_run(arguments: dict[str, Any], expected: list[float], tmp_path: Path) -> None:
    model = freeze_tower(tiny_llava())
    loop, losses = trainer(model, tmp_path, **arguments)
    with dropflow.attach(model, HIDROP):
        loop.train()
    assert losses.train == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]


def test_padding_on_the_left_gives_the_same_losses(tmp_path: Path) -> None:
    model = freeze_tower(tiny_llava())
    loop, losses = trainer(model, tmp_path)
    loop.data_collator = partial(collate, side="left")
    with dropflow.attach(model, HIDROP):
        loop.train()
    assert losses.train == pytest.approx(masked_losses("left"), rel=1e-5)


@pytest.mark.parametrize("logits", ["all", "labelled"])
def test_autocast_stays_close(logits: Any, expected: list[float], tmp_path: Path) -> None:
    """accelerate then sets a forward on the model, which calls the model's own."""
    model = freeze_tower(tiny_llava())
    loop, losses = trainer(model, tmp_path, bf16=True)
    with dropflow.attach(model, HIDROP, logits=logits):
        loop.train()
    assert losses.train == pytest.approx(expected, rel=0.02)
    assert losses.train != pytest.approx(expected, rel=1e-6)
    assert next(model.parameters()).dtype == torch.float32


def test_a_checkpoint_of_the_trainer_is_evaluated_through_the_policy_it_was_trained_with(tmp_path: Path) -> None:
    model = freeze_tower(tiny_llava())
    loop, losses = trainer(
        model, tmp_path, eval_strategy="steps", eval_steps=STEPS, save_strategy="steps", save_steps=STEPS
    )
    dropflow.attach(model, HIDROP)  # never detached: a training script ends here
    loop.train()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / f"checkpoint-{STEPS}").eval()
    with dropflow.attach(loaded) as flow:
        again, _ = trainer(loaded, tmp_path)
        measured = again.evaluate()["eval_loss"]
    assert flow.policy == dropflow.load_policy(HIDROP)
    assert measured == pytest.approx(losses.eval[0], rel=1e-6)
    assert again.evaluate()["eval_loss"] != pytest.approx(measured, rel=1e-3)  # dense, it is another model

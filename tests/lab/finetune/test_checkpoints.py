"""Checkpoints of a Trainer: which are whole, and that their weights come back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HIDROP, tiny_llava
from training import freeze_tower, trainer

import dropflow
from dropflow_lab.errors import InputError
from dropflow_lab.finetune import RestoredWeights, last_whole_checkpoint, load_weights

pytest.importorskip("accelerate")

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
"""In the order in which the Trainer writes them."""
SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "train_sampling_strategy": "random"}


@pytest.fixture(autouse=True)
def _newer_names() -> Any:
    """transformers 5.23 renames gradient checkpointing; 5.20 and PEFT know only the old name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def checkpoint(run: Path, step: int) -> Path:
    """A whole checkpoint, as far as its files tell."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(3)}, folder / FILES[0])
    for name in FILES[1:4]:
        torch.save({"state": torch.zeros(3)}, folder / name)
    (folder / FILES[4]).write_text(json.dumps({"global_step": step}))
    return folder


def test_the_last_whole_one_is_taken_and_later_ones_are_told(tmp_path) -> None:
    first, *_, last = [checkpoint(tmp_path, step) for step in (2, 4, 10)]
    (tmp_path / "checkpoint-20").write_text("no folder")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == (last, {})
    (last / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    assert last_whole_checkpoint(tmp_path) == (
        first,
        {
            last: "no optimizer.pt",
            tmp_path / "checkpoint-4": "no whole trainer_state.json, so it was never finished",
        },
    )


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_cut_off_is_named(tmp_path, name) -> None:
    whole, other = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    content = (other / name).read_bytes()
    (other / name).write_bytes(content[: len(content) // 2])
    assert name in last_whole_checkpoint(tmp_path)[1][other]
    (other / name).unlink()
    found, faults = last_whole_checkpoint(tmp_path)
    assert found == whole
    assert "no weights" in faults[other] or name in faults[other]


def test_every_process_needs_its_random_numbers(tmp_path) -> None:
    folder = checkpoint(tmp_path, 1)
    with pytest.raises(InputError, match=r"checkpoint-1 has no rng_state_0\.pth; delete them to train"):
        last_whole_checkpoint(tmp_path, processes=2)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    torch.save({}, folder / "rng_state_1.pth")
    assert last_whole_checkpoint(tmp_path, processes=2) == (folder, {})


@pytest.mark.parametrize("count", range(len(FILES)))
def test_what_a_kill_leaves_does_not_block_a_run(tmp_path, count) -> None:
    folder = checkpoint(tmp_path, 1)
    for name in FILES[count:]:
        (folder / name).unlink()
    found, faults = last_whole_checkpoint(tmp_path)
    assert (found, list(faults)) == (None, [folder])


def test_one_that_was_finished_and_lost_a_file_is_refused_by_name(tmp_path) -> None:
    (checkpoint(tmp_path, 1) / "scheduler.pt").unlink()
    with pytest.raises(InputError, match=r"no checkpoint can be resumed: checkpoint-1 has no scheduler\.pt; delete"):
        last_whole_checkpoint(tmp_path)


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), (torch.bfloat16, 0.2)])
def test_a_trainer_that_resumes_ends_with_the_same_weights(tmp_path, dtype, dropout) -> None:
    """Under a policy; the Trainer alone would go on from the weights that the model begins with."""

    def train(resume: Path | None) -> dict[str, torch.Tensor]:
        model = freeze_tower(tiny_llava()).to(dtype)
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = dropout
        loop, _ = trainer(model, tmp_path, **SAVING)
        if resume:
            loop.add_callback(RestoredWeights(resume))
        with dropflow.attach(model, HIDROP):
            loop.train(resume_from_checkpoint=resume and str(resume))
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    whole, resumed = train(None), train(tmp_path / "checkpoint-2")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_adapters_of_peft_come_back_by_the_trainer_alone(tmp_path) -> None:
    peft = pytest.importorskip("peft")

    def train(resume: Path | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|down_proj)", lora_dropout=0.2)
        model = peft.get_peft_model(tiny_llava(), config)
        loop, _ = trainer(model, tmp_path, **SAVING)
        with dropflow.attach(model, HIDROP):
            loop.train(resume_from_checkpoint=resume and str(resume))
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    whole, resumed = train(None), train(tmp_path / "checkpoint-2")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_weights_of_another_model_are_refused(tmp_path) -> None:
    model = tiny_llava()
    model.save_pretrained(tmp_path / "whole")
    held = load_file(tmp_path / "whole" / "model.safetensors")
    name = next(name for name in held if name.endswith("q_proj.weight"))
    for folder, weights in {
        "missing": {other: weight for other, weight in held.items() if other != name},
        "unexpected": held | {"language_model.model.layers.0.odd.weight": torch.zeros(2)},
        "mismatched": held | {name: torch.zeros(2, 2)},
    }.items():
        model.save_pretrained(tmp_path / folder)
        save_file(weights, tmp_path / folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=f"{folder}: (not the weights of this model: {folder}|its weights cannot)"):
            load_weights(model, tmp_path / folder)
    with pytest.raises(InputError, match="whole: not the weights of this model"):
        load_weights(tiny_llava(layers=7), tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="whole: its weights cannot be loaded"):
        load_weights(model, tmp_path / "whole")

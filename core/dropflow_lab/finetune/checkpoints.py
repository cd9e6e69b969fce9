"""Finds the whole checkpoints of a Trainer, and restores their weights."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerCallback

import dropflow
from dropflow_lab.errors import InputError, shortened

_STATE = "trainer_state.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def last_whole_checkpoint(run: Path, processes: int = 1) -> tuple[Path | None, dict[Path, str]]:
    """Return the last checkpoint in a Trainer's folder that can be resumed, and the fault of each later one.

    A whole checkpoint has the weights, the states of optimizer, schedule and (for each of the `processes`) random
    number generators, and the Trainer's own state, which is written last; one that a killed run left half written is
    not whole. Returns `None` if no checkpoint was finished. Raises `InputError` if none is whole, but one lost a file
    after it was finished.
    """
    faults: dict[Path, str] = {}
    for checkpoint in checkpoints(run):
        fault = _fault(checkpoint, processes)
        if fault is None:
            return checkpoint, faults
        faults[checkpoint] = fault
    if any(_is_json(checkpoint / _STATE) for checkpoint in faults):
        told = "; ".join(f"{checkpoint.name} has {fault}" for checkpoint, fault in faults.items())
        raise InputError(f"{run}: no checkpoint can be resumed: {told}; delete them to train from the beginning")
    return None, faults


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, whole or not, the last one first."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in run.glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def load_weights(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Load the weights of a checkpoint into `model`, in place, in the model's own dtypes.

    They are read by `from_pretrained`. The Trainer's `resume_from_checkpoint` is not enough: it looks for the model's
    current names in the file, while `save_pretrained` writes the architecture's names in older versions of
    transformers, and it only warns about weights that it does not find. What the stages of an attached policy train is
    loaded, too, and refused with `PolicyError` where it is missing. Raises `InputError` for a weight that is
    missing, unexpected, or of another shape.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{checkpoint}: expected a model of transformers to load weights into, got a {type(model)}")
    double = any(weight.dtype == torch.float64 for weight in model.state_dict().values())
    options = {
        "dtype": torch.float64 if double else torch.float32,
        "local_files_only": True,
    }  # no dtype loses precision
    try:
        saved, told = type(model).from_pretrained(checkpoint, output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{checkpoint}: its weights cannot be loaded: {shortened(str(error))}; name another checkpoint"
        ) from None
    faults = [f"{word.replace('_', ' ')} {sorted(map(str, names))[:3]}" for word, names in told.items() if names]
    stages = {name: value for name, value in model.state_dict().items() if name.startswith("dropflow_stages.")}
    try:
        if not faults:
            model.load_state_dict(saved.state_dict() | stages)
    except RuntimeError as error:  # of another architecture
        faults = [shortened(str(error))]
    if faults:
        raise InputError(f"{checkpoint}: not the weights of this model: {', '.join(faults)}; name a checkpoint of it")
    flow = dropflow.flow_of(model)
    flows = [flow] if isinstance(flow, dropflow.Flow) else [] if flow is None else list(flow.values())
    for each in [each for each in flows if each is not None and each.modules][:1]:  # a set shares its modules by name
        each.load_stages(checkpoint)


class RestoredWeights(TrainerCallback):  # type: ignore[misc]  # transformers leaves it untyped
    """Restores the weights of a checkpoint when training begins, after whatever the Trainer has loaded.

    Pass it as a callback to a Trainer that resumes from the same checkpoint; see `load_weights`.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self._checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Load the weights."""
        load_weights(model, self._checkpoint)


def _fault(checkpoint: Path, processes: int) -> str | None:
    """Return what keeps a checkpoint from being resumed."""
    if not _is_json(checkpoint / _STATE):
        return f"no whole {_STATE}, so it was never finished"
    weights = [path for pattern in _WEIGHTS for path in checkpoint.glob(pattern)]
    if not weights:
        return "no weights"
    dice = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    own = next(checkpoint.glob("global_step*"), None)  # DeepSpeed's, where each process writes its share
    if own is None:
        optimizer = [checkpoint / "optimizer.pt"]
    else:
        optimizer = [own / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(processes)]
        optimizer.append(own / "mp_rank_00_model_states.pt")
    states = [*optimizer, *(checkpoint / name for name in ("scheduler.pt", *dice))]
    for path in (*weights, *states):
        if not path.is_file():
            return f"no {path.name}"
        if not (_is_safetensors(path) if path.suffix == ".safetensors" else zipfile.is_zipfile(path)):
            return f"a damaged {path.name}"
    return None


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False

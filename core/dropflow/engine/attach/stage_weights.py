"""Weights of the stages' modules on disk: a safetensors file beside the model that records the policy.

Its entries are named `<stage>.<name in the module>`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from dropflow.engine.attach.stage_modules import StageModules, is_of_stages, key_of
from dropflow.engine.model.shadowing import Shadows
from dropflow.errors import PolicyError, UnsupportedCall
from dropflow.policy.recorded import WEIGHTS


def save_weights(states: Mapping[str, Tensor], folder: str | os.PathLike[str], *, write: bool = True) -> None:
    """Write the states of the stages' modules into `folder`; with `write=False` only gather what ranks share."""
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in states.items()}
    if not write:
        return
    path = Path(folder) / WEIGHTS
    part = path.with_name(f".{WEIGHTS}.part")
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in whole.items()}, part, {"format": "pt"}
    )
    part.replace(path)


def saving(original: Any, modules: StageModules, passing: Shadows, model: Any) -> Any:
    """The model's `save_pretrained`, which writes the weights of the stages' modules to a file of their own."""

    @wraps(original)
    def save_pretrained(
        save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        states = modules.states(state_dict)
        if kwargs.get("push_to_hub"):
            raise UnsupportedCall(
                "push_to_hub: would leave out the weights of the policy's stages; call the model's own "
                "`push_to_hub`, which uploads them, or save first and upload the folder"
            )
        rest = state_dict and {name: value for name, value in state_dict.items() if not is_of_stages(name)}
        with modules.hidden(passing, model):
            saved = original(save_directory, is_main_process, rest, *args, **kwargs)
        save_weights(states, save_directory, write=is_main_process)
        return saved

    return save_pretrained


def find_weights(source: str | os.PathLike[str], **hub: Any) -> Path | None:
    """The file `WEIGHTS` of a model's folder or of its repository on the hub; `None` if it has none."""
    if os.path.isdir(source):
        path = Path(source, hub.get("subfolder") or "", WEIGHTS)
        return path if path.is_file() else None
    if not str(source):
        return None
    try:
        found = cached_file(
            str(source),
            WEIGHTS,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
    except OSError:  # no such repository
        return None
    return None if found is None else Path(found)


def knows_any(modules: StageModules, source: Path) -> bool:
    """Whether a file has weights for one of the stages, by its name."""
    return any(key.startswith(f"{key_of(name)}.") for key in _where(source) for name in modules.stages)


def load_weights(modules: StageModules, source: str | os.PathLike[str]) -> None:
    """Load the weights of every stage's module, by name, from a safetensors file or a folder of such files.

    A folder without `WEIGHTS` is taken for a published checkpoint, where a stage's weights have the prefixes in its
    `published_as`. Raises `PolicyError` if a weight is missing, unknown or of another shape; nothing is loaded then.
    """
    where = _where(Path(source))
    found: dict[str, dict[str, Tensor]] = {}
    faults: list[str] = []
    for name, stage in modules.stages.items():
        expected = modules.of(name).state_dict()
        names = {own: _found(own, (f"{key_of(name)}.", *stage.published_as), where) for own in expected}
        own_names = {key for key in where if key.startswith(f"{key_of(name)}.")}
        missing = [own for own, key in names.items() if key is None]
        unknown = sorted(own_names - {key for key in names.values() if key is not None})
        values = {own: _read(where[key], key) for own, key in names.items() if key is not None}
        shapes = [
            f"{own} is {tuple(value.shape)}, expected {tuple(expected[own].shape)}"
            for own, value in values.items()
            if value.shape != expected[own].shape
        ]
        wrong = [f"lacks {', '.join(missing[:4])}"] if missing else []
        wrong += [f"has {', '.join(unknown[:4])}, which the stage does not know"] if unknown else []
        if wrong or shapes:
            faults.append(
                f"{source}: not the weights of stages.{name}: {'; '.join([*wrong, *shapes[:2]])}; name with `weights=` "
                "the folder that was saved while this policy was attached"
            )
        found[name] = values
    if faults:
        raise PolicyError("\n".join(faults))
    for name, values in found.items():
        modules.of(name).load_state_dict(values)


def _where(source: Path) -> dict[str, Path]:
    """Name of every tensor at `source` -> its file."""
    own = source / WEIGHTS
    files = [source] if source.is_file() else [own] if own.is_file() else sorted(source.glob("*.safetensors"))
    if not files:
        raise PolicyError(f"{source}: expected a safetensors file, or a folder with {WEIGHTS}; name another")
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise PolicyError(f"{file}: cannot be read: {error}; save it again") from None
    return found


def _found(own: str, prefixes: tuple[str, ...], where: Mapping[str, Path]) -> str | None:
    return next((f"{prefix}{own}" for prefix in prefixes if f"{prefix}{own}" in where), None)


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        value: Tensor = opened.get_tensor(key)
    return value

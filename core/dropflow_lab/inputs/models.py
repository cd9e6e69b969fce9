"""Loads a multimodal model with its processor: from the package, a folder, or the cache of the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

import dropflow
from dropflow.policy.recorded import recorded_policy
from dropflow_lab.errors import InputError, shortened


def load_model(folder: Path | None = None, *, downloads: bool = False, **options: Any) -> tuple[Any, Any]:
    """Return model and processor of `folder`, or the embedded demo model; on a GPU if there is one (see `device`).

    If there is no such folder, `folder` may name a shipped checkpoint of the demo model, such as `hidrop`, or a model
    in the local cache of the hub, such as `llava-hf/llava-1.5-7b-hf`; with `downloads`, any model of the hub. Weights
    keep the dtype they are stored in (the shipped ones run in float32). `options` are those of transformers'
    `from_pretrained`, such as `dtype` and `revision`; with a `device_map`, the model stays where that puts it. Raises
    `InputError` if there is no such model, transformers cannot load it, or it lacks weights of the model.
    """
    from dropflow_lab.digits.checkpoints.changes import CHANGES

    with _no_progress_bar():
        name = "dense" if folder is None else _shipped(folder)
        if name is not None and name in CHANGES:
            _check_options_of_change(name, options)
            model, processor = CHANGES[name]()
            model.to(options.get("dtype", torch.float32))
            return model.to(device()).eval(), processor
        if folder is None or name is not None:
            folder, options = _embedded(name), {"dtype": torch.float32} | options
        elif not downloads:
            _check_is_local(folder)
        model, processor = _loaded(folder, {"local_files_only": not downloads} | options)
    return (model if "device_map" in options else model.to(device())).eval(), processor


def device() -> str:
    """Return the device of this process: of a machine's GPUs, the one that torchrun's `LOCAL_RANK` stands for.

    Launchers that give every process a GPU of its own (SLURM, Ray) hide the others.
    """
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def policy_of(model: Any, overrides: Sequence[str] = ()) -> dropflow.Policy:
    """Return the policy that a model without an attached one records, changed by `overrides`.

    Raises `PolicyError` if there is none, or if the weights that its stages have learned are missing: attached by its
    content, it would start with fresh ones.
    """
    with dropflow.attach(model, overrides=overrides):
        return dropflow.load_policy(recorded_policy(model.config), overrides)


def _shipped(folder: Path) -> str | None:
    """Return the shipped checkpoint that `folder` names, or `None`.

    A folder of the same name that holds no model, such as one of clips, does not hide it.
    """
    return str(folder) if not (folder / "config.json").is_file() and str(folder) in _embedded_names() else None


def _check_options_of_change(name: str, options: dict[str, Any]) -> None:
    """Raise `InputError` for an option of a shipped model that is stored as a change, other than `dtype`."""
    if unknown := sorted(options.keys() - {"dtype"}):
        raise InputError(f"{name}: this embedded model takes no option {unknown[0]!r}; leave it out")


def _embedded(name: str | None) -> Path:
    from dropflow_lab.digits.checkpoints.model import checkpoint_path

    try:
        return checkpoint_path(name or "dense")
    except (OSError, LookupError) as error:
        raise InputError(f"the embedded model cannot be loaded: {_one_line(error)}; reinstall dropflow") from None


def _embedded_names() -> list[str]:
    """Names of the embedded models, those that are stored as changes included."""
    from dropflow_lab.digits.checkpoints.changes import CHANGES
    from dropflow_lab.digits.checkpoints.model import checkpoint_names

    return sorted((*checkpoint_names(), *CHANGES))


def _check_is_local(folder: Path) -> None:
    if not (folder / "config.json").is_file() and not _is_cached(folder):
        raise InputError(
            f"{folder}: expected a model folder with a config.json, or the name of a model in the local cache of the "
            f"hub or of an embedded one ({', '.join(_embedded_names())}), found none"
        )


def _loaded(folder: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    whose = {name: options[name] for name in ("local_files_only", "revision") if name in options}
    try:
        model, told = AutoModelForImageTextToText.from_pretrained(
            folder, **({"dtype": "auto"} | options), output_loading_info=True, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(folder, **whose, trust_remote_code=False)
    except Exception as error:  # transformers raises all kinds of errors on a broken file
        raise InputError(f"{folder}: transformers cannot load this model: {_one_line(error)}") from error
    missing = sorted(map(str, told["missing_keys"]))
    if missing:
        raise InputError(
            f"{folder}: expected all weights of the model, {len(missing)} are missing, such as {missing[0]}"
        )
    return model, processor


def _is_cached(name: Path) -> bool:
    """Whether this is not a folder, but the hub's name of a model (`owner/name`) in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    if name.exists() or name.is_absolute() or len(name.parts) != 2 or ".." in name.parts:
        return False
    try:
        return isinstance(try_to_load_from_cache(str(name), "config.json"), str)
    except ValueError:  # not a name that the hub allows
        return False


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return shortened(str(error) or type(error).__name__)

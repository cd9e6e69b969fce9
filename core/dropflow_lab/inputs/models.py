"""Loads a multimodal model with its processor, from the package or from a local folder, never from a network."""

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


def load_model(folder: Path | None = None) -> tuple[Any, Any]:
    """Return model and processor of `folder`, or the embedded demo model; on a GPU if there is one (see `device`).

    If there is no such folder, `folder` may name a shipped checkpoint of the demo model, such as `hidrop`, or a model
    in the local cache of the hub, such as `llava-hf/llava-1.5-7b-hf`. Weights keep the dtype they are stored in (the
    shipped ones run in float32). Raises `InputError` if there is no such model, transformers cannot load it, or it
    lacks weights of the model.
    """
    with _no_progress_bar():
        name = "dense" if folder is None else _shipped(folder)
        model, processor = _from_folder(folder) if folder is not None and name is None else _embedded(name)
    return model.to(device()).eval(), processor


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
    """Return the shipped checkpoint that `folder` names, or `None`."""
    from dropflow_lab.digits.checkpoints.model import checkpoint_names

    return str(folder) if not folder.is_dir() and str(folder) in checkpoint_names() else None


def _embedded(name: str | None) -> tuple[Any, Any]:
    from dropflow_lab.digits.checkpoints.model import load

    try:
        return load(name or "dense")
    except (OSError, LookupError) as error:
        raise InputError(f"the embedded model cannot be loaded: {_one_line(error)}; reinstall dropflow") from None


def _from_folder(folder: Path) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file() and not _is_cached(folder):
        raise InputError(
            f"{folder}: expected a model folder with a config.json, or the name of a model in the local cache of the "
            "hub, found none"
        )
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, told = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **options
        )
        processor = AutoProcessor.from_pretrained(folder, **options)
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

"""Loads a multimodal model with its processor, from the package or from a local folder, never from a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from dropflow_lab.errors import InputError


def load_model(folder: Path | None = None) -> tuple[Any, Any]:
    """Return model and processor of `folder`, or the embedded demo model; on the GPU where there is one.

    Where no such folder is there, `folder` may name a shipped checkpoint of the demo model, such as `hidrop`. Weights
    keep the dtype they are stored in (the shipped ones run in float32). Raises `InputError` where the folder is missing
    or transformers cannot load it.
    """
    with _no_progress_bar():
        name = "dense" if folder is None else _shipped(folder)
        model, processor = _from_folder(folder) if folder is not None and name is None else _embedded(name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def _shipped(folder: Path) -> str | None:
    """Name of the shipped checkpoint that `folder` stands for, if it does."""
    from dropflow_lab.digits.checkpoints.model import checkpoint_names

    return str(folder) if not folder.is_dir() and str(folder) in checkpoint_names() else None


def _embedded(name: str | None) -> tuple[Any, Any]:
    from dropflow_lab.digits.checkpoints.model import load

    try:
        return load(name or "dense")
    except (OSError, LookupError) as error:
        raise InputError(f"the embedded model cannot be loaded: {_one_line(error)}") from None


def _from_folder(folder: Path) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: expected a model folder with a config.json, found none")
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", local_files_only=True)
        return model, AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: transformers cannot load this model: {_one_line(error)}") from None


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
    return " ".join(str(error).split())

"""Widths and layers of a text decoder, read from a model folder's config without its weights."""

from __future__ import annotations

from pathlib import Path

from dropflow.backbone.flops import DecoderWidths
from dropflow.backbone.mixers import Mixer, mixers_of
from dropflow_lab.errors import InputError, shortened


def read_widths(folder: Path) -> tuple[DecoderWidths, tuple[Mixer, ...]]:
    """Return widths of the text part of `folder/config.json`, and what mixes the tokens of each of its decoder layers.

    Raises `InputError` if there is no such file or transformers cannot read it.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: expected a model folder with a config.json, found none")
    from transformers import AutoConfig

    try:
        text = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        return DecoderWidths.of(text), mixers_of(text)
    except Exception as error:  # transformers raises all kinds of errors on a broken file
        raise InputError(f"{folder / 'config.json'}: cannot be read: {shortened(str(error))}") from error

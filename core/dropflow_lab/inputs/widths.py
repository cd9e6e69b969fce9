"""Widths and layers of a model, read from its folder's config without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropflow.backbone.flops import DecoderWidths
from dropflow.backbone.mixers import Mixer, mixers_of
from dropflow_lab.errors import InputError, shortened


@dataclass(frozen=True)
class TowerWidths:
    """Sizes of a vision encoder whose layers all see all of its rows, with an MLP of two matrices."""

    hidden: int
    intermediate: int
    layers: int
    rows: int
    """Patches of one picture."""

    @property
    def flops(self) -> float:
        """Multiply-adds of its layers for one picture: 4 n d^2 + 2 n^2 d + 2 n d m each."""
        n, d, m = self.rows, self.hidden, self.intermediate
        return self.layers * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)


CLIP_L_336 = TowerWidths(hidden=1024, intermediate=4096, layers=24, rows=577)
"""The encoder of LLaVA-1.5-7B."""


def read_widths(folder: Path) -> tuple[DecoderWidths, tuple[Mixer, ...], TowerWidths | None]:
    """Return widths of the text part of `folder/config.json`, what mixes its decoder layers' tokens, and its tower.

    The sizes of the tower are `None` where the config does not state them as those of CLIP and SigLIP do.
    Raises `InputError` if there is no such file or transformers cannot read it.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: expected a model folder with a config.json, found none")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        return DecoderWidths.of(text), mixers_of(text), _tower(getattr(config, "vision_config", None))
    except Exception as error:  # transformers raises all kinds of errors on a broken file
        raise InputError(f"{folder / 'config.json'}: cannot be read: {shortened(str(error))}") from error


def _tower(config: Any) -> TowerWidths | None:
    """Sizes of a vision encoder; `None` for one that takes pictures of any size, or joins patches."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
    stated = [getattr(config, name, None) for name in names]
    sizes = [size[0] if isinstance(size, list | tuple) else size for size in stated]
    whole = [size for size in sizes if isinstance(size, int) and size > 0]
    if len(whole) < len(names) or hasattr(config, "spatial_merge_size"):
        return None
    hidden, intermediate, layers, side, patch = whole
    return TowerWidths(hidden, intermediate, layers, (side // patch) ** 2)

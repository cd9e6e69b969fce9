"""Folders with tiny models of two families and their processors, and a folder of questions to train them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dropflow.testing import tiny_models
from dropflow_lab.digits.checkpoints.model import build_model, export

WORDS = ("what", "is", "this", "in", "both", "?", "a", "red", "green", "blue", "square", "user", "model", ":")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' ' + message['role'].replace('assistant', 'model') + ' :' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' <start>' }}{% else %}{{ ' ' + part['text'] | trim }}{% endif %}"
    "{% endfor %}{{ ' </s>' }}{% endfor %}{% if add_generation_prompt %}{{ ' model :' }}{% endif %}"
)
"""Ends every turn with an end token, that of the user, too."""


def gemma3(folder: Path) -> Path:
    """A Gemma 3 of six layers, some with a sliding window, whose tokens have types; 16 visual tokens a picture."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma3Processor, PreTrainedTokenizerFast
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<start>": 90, "<end>": 91, "<image>": 98}
    taken = set(special.values())
    free = [number for number in range(99) if number not in taken]
    vocabulary = special | dict(zip([*WORDS, *(f"w{n}" for n in range(99))], free, strict=False))
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="w0",
        padding_side="left",
        extra_special_tokens={"boi_token": "<start>", "eoi_token": "<end>", "image_token": "<image>"},
    )
    images = Gemma3ImageProcessorPil(size={"height": 48, "width": 48})
    Gemma3Processor(images, tokenizer, TEMPLATE, image_seq_length=16).save_pretrained(folder)
    tiny_models()["gemma3"][1].model().save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """The embedded LLaVA with four untrained layers; 144 visual tokens a picture."""
    export(build_model(decoder_layers=4), folder)
    return folder


FAMILIES = {"llava": llava, "gemma3": gemma3}


def squares(folder: Path, count: int = 6, *, pairs: bool = False) -> Path:
    """Questions about squares of one colour; with `pairs`, every other one is about two of them."""
    (folder / "images").mkdir(parents=True)
    colours: Sequence[tuple[str, Any]] = (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255)))
    for name, colour in colours:
        Image.new("RGB", (96, 96), colour).save(folder / "images" / f"{name}.png")
    lines = []
    for number in range(count):
        (one, _), (two, _) = colours[number % 3], colours[(number + 1) % 3]
        if pairs and number % 2:
            lines.append({"images": [f"{one}.png", f"{two}.png"], "question": "what is in both ?", "answer": two})
        else:
            lines.append({"image": f"{one}.png", "question": "what is this ?", "answer": f"a {one} square"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight in a model folder, in float32."""
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}


def logged(folder: Path, name: str = "loss") -> list[float]:
    """A number of the log, step by step."""
    rows = map(json.loads, (folder / "training-log.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]

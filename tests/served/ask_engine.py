"""Writes what `make test-vllm` asks, with the answers of this engine: run where dropflow is installed, without vLLM.

A folder gets two models in the form that vLLM reads, pictures, prompts, and for every case the tokens of its answers.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import dropflow
from dropflow_lab.digits.checkpoints.model import checkpoint_path, load
from dropflow_lab.digits.data.dataset import examples

QUESTIONS = 60
LONGEST = 8
"""Tokens of an answer at most."""
STAGES: Mapping[str, Mapping[str, Any]] = {
    "divprune": {"use": "divprune/max-min", "keep": 0.25},
    "stride": {"use": "control/stride", "encode": 0.25},
    "random": {"use": "control/random", "encode": 0.25},
    "pool": {"use": "control/pool"},
    "scope": {"use": "scope/saliency-coverage", "keep": 0.25, "alpha": 0},
}
COMPACT = ("divprune", "random")
"""Stages that LLaVA also runs with compact positions."""
QWEN = ("divprune", "stride", "pool")
"""Stages that the tiny Qwen2.5-VL runs."""
WORDS = ["<pad>", "<s>", "</s>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SIZE = 100
"""Words of the tiny Qwen2.5-VL's vocabulary."""


def policy(stage: str, positions: str) -> dict[str, Any]:
    return {"name": f"{stage}-{positions}", "positions": positions, "stages": {"one": dict(STAGES[stage])}}


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of each case -> the model, and the policy."""
    found = {f"llava-{stage}": ("llava", policy(stage, "persistent")) for stage in STAGES}
    found |= {f"llava-{stage}-compact": ("llava", policy(stage, "compact")) for stage in COMPACT}
    return found | {f"qwen-{stage}": ("qwen", policy(stage, "persistent")) for stage in QWEN}


def write_llava(folder: Path) -> list[dict[str, Any]]:
    """The embedded model, and questions about one picture; every third asks about two, and every tenth about none."""
    source = checkpoint_path("dense")
    shutil.copytree(source, folder / "llava")
    weights = load_file(source / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): own for name, own in weights.items()}
    save_file(renamed, folder / "llava" / "model.safetensors", metadata={"format": "pt"})
    tokenizer = load("dense")[1].tokenizer
    asked = []
    for number, example in enumerate(examples("test", QUESTIONS + QUESTIONS // 3)):
        example.image.save(folder / f"scene-{number}.png")
        text = f"<s> user : <image> {example.question} assistant :"
        pictures = [number]
        if number >= QUESTIONS:
            first = asked[number - QUESTIONS]
            text = f"<s> user : <image> {first['question']} <image> {example.question} assistant :"
            pictures = [number - QUESTIONS, number]
        asked.append(
            {
                "question": example.question,
                "answer": example.answer,
                "ids": tokenizer(text, add_special_tokens=False)["input_ids"],
                "pictures": [f"scene-{one}.png" for one in pictures],
            }
        )
    return asked


def answer_llava(folder: Path, asked: Sequence[Mapping[str, Any]], said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The engine's answers, one question at a time, and how many tokens of the prompt are left."""
    model, processor = load("dense")
    answers = []
    with dropflow.attach(model, said) as flow, torch.no_grad():
        for one in asked:
            text = processor.tokenizer.decode(one["ids"])
            pictures = [Image.open(folder / name) for name in one["pictures"]]
            inputs = processor(images=pictures, text=text, return_tensors="pt", add_special_tokens=False)
            answers.append(_answer(model, flow, inputs))
    return answers


def _answer(model: Any, flow: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    length = inputs["input_ids"].shape[1]
    made = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)[0, length:].tolist()
    return {"tokens": made, "prompt": int(flow.live()[0, 0].sum())}


def tiny_qwen() -> Any:
    """A Qwen2.5-VL with random weights, large enough that what it sees decides what it says."""
    config = Qwen2_5_VLConfig(
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        text_config={
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": SIZE,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 128,
            "depth": 3,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                size = 1.5 if "embed" in name else 1.6
                weights.copy_(torch.randn(weights.shape) * size / weights[0].numel() ** 0.5)
    model.generation_config.eos_token_id = SIZE - 1
    return model


def write_qwen(folder: Path) -> list[dict[str, Any]]:
    """The tiny model with its processor's files, and prompts with one picture or two, of several sizes."""
    model, target = tiny_qwen(), folder / "qwen"
    model.save_pretrained(target)
    words = [*WORDS, *(f"w{number}" for number in range(SIZE - len(WORDS)))]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="w0",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=WORDS[3:],
        extra_special_tokens={"image_token": WORDS[5], "video_token": WORDS[6]},
    ).save_pretrained(target)
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    Qwen2VLImageProcessorPil(size=sizes).save_pretrained(target)
    said = json.loads((target / "preprocessor_config.json").read_text())
    said |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (target / "preprocessor_config.json").write_text(json.dumps(said))
    (target / "video_preprocessor_config.json").write_text(
        json.dumps({"size": sizes, "video_processor_type": "Qwen2VLVideoProcessor"})
    )
    dice, asked = np.random.default_rng(0), []
    for number in range(12):
        names = []
        for picture in range(1 + number % 2):
            height, width = dice.integers(2, 8, 2) * 28
            pixels = dice.integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8)
            names.append(f"noise-{number}-{picture}.png")
            Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.NEAREST).save(folder / names[-1])
        ids = [1]
        for _ in names:
            ids += [*dice.integers(7, SIZE - 1, 3).tolist(), 3, 5, 4]
        asked.append({"ids": [*ids, *dice.integers(7, SIZE - 1, 6).tolist()], "pictures": names})
    return asked


def answer_qwen(folder: Path, asked: Sequence[Mapping[str, Any]], said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The engine's answers, one prompt at a time."""
    model, images = tiny_qwen(), Qwen2VLImageProcessorPil.from_pretrained(folder / "qwen")
    answers = []
    with dropflow.attach(model, said) as flow, torch.no_grad():
        for one in asked:
            seen = images([Image.open(folder / name) for name in one["pictures"]], return_tensors="pt")
            counts = iter((seen["image_grid_thw"].prod(-1) // 4).tolist())
            ids = torch.tensor([[word for id in one["ids"] for word in ([id] * next(counts) if id == 5 else [id])]])
            types = (ids == 5).long()
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **seen}
            answers.append(_answer(model, flow, inputs))
    return answers


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    asked = {"llava": write_llava(folder), "qwen": write_qwen(folder)}
    answer = {"llava": answer_llava, "qwen": answer_qwen}
    told = {
        name: {"model": model, "policy": said, "answers": answer[model](folder, asked[model], said)}
        for name, (model, said) in cases().items()
    }
    (folder / "cases.json").write_text(json.dumps({"asked": asked, "cases": told, "longest": LONGEST}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Asks vLLM what `ask_engine.py` has written, in a process of its own: one engine for each call."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams

ARCHITECTURES = {"llava": "DropflowLlavaForConditionalGeneration", "qwen": "DropflowQwen2_5_VLForConditionalGeneration"}


def engine(folder: Path, case: dict[str, Any], **options: Any) -> LLM:
    overrides = {"architectures": [ARCHITECTURES[case["model"]]], "dropflow": case["policy"]}
    return LLM(
        str(folder / case["model"]),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 2},
        hf_overrides=overrides,
        **options,
    )


def prompts(folder: Path, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for one in asked:
        pictures = [Image.open(folder / name).convert("RGB") for name in one["pictures"]]
        found.append({"prompt_token_ids": one["ids"], "multi_modal_data": {"image": pictures}})
    return found


def main(folder: Path, name: str, options: dict[str, Any], into: Path) -> None:
    told = json.loads((folder / "cases.json").read_text())
    case = told["cases"][name]
    llm = engine(folder, case, **options)
    asked = prompts(folder, told["asked"][case["model"]])
    sampling = SamplingParams(temperature=0, max_tokens=told["longest"])
    rounds = []
    for _ in range(2):  # the second round finds the prompts, and the images, in vLLM's caches
        said = llm.generate(asked, sampling, use_tqdm=False)
        rounds.append(
            [(list(one.outputs[0].token_ids), len(one.prompt_token_ids), one.num_cached_tokens) for one in said]
        )
    keys = ("tokens", "prompt", "cached")
    into.write_text(json.dumps([[dict(zip(keys, one, strict=True)) for one in said] for said in rounds]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))

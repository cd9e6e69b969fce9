"""vLLM answers as the engine does, with as many tokens in the prompt as planned; what it cannot do is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="`make test-vllm` brings it")

HERE = Path(__file__).parent
CASES = [
    *(f"llava-{stage}" for stage in ("divprune", "stride", "random", "pool", "scope")),
    *(f"llava-{stage}-compact" for stage in ("divprune", "random")),
    *(f"qwen-{stage}" for stage in ("divprune", "stride", "pool")),
]
IN_PIECES = {"block_size": 32, "max_num_batched_tokens": 17, "enable_prefix_caching": True}
"""Prompts, and images, run in pieces of 17 tokens, and parts of them are found in the prefix cache."""
HIDROP = {"name": "h", "stages": {"exit": {"use": "hidrop/early-exit", "at": 10}}}


def answers(
    folder: Path, name: str, into: Path, options: dict[str, Any] | None = None, *, processes: bool = False
) -> list[list[dict[str, Any]]]:
    """What vLLM says to a case, twice, in a process of its own."""
    given = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))}
    words = [sys.executable, str(HERE / "ask_vllm.py"), str(folder), name, json.dumps(options or {}), str(into)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=given)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: list[list[dict[str, Any]]] = json.loads(into.read_text(encoding="utf-8"))
    return found


def check(told: dict[str, Any], name: str, rounds: list[list[dict[str, Any]]]) -> None:
    expected = told["cases"][name]["answers"]
    for said in rounds:
        assert [one["tokens"] for one in said] == [one["tokens"] for one in expected]
        assert [one["prompt"] for one in said] == [one["prompt"] for one in expected]


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_the_engine(asked: Path, told: dict[str, Any], name: str, tmp_path: Path) -> None:
    check(told, name, answers(asked, name, tmp_path / "said.json"))


def test_every_case_is_asked(told: dict[str, Any]) -> None:
    assert set(told["cases"]) == set(CASES)
    assert sum(len(one["pictures"]) == 2 for one in told["asked"]["llava"]) == 20
    assert len(told["asked"]["llava"]) == 80
    assert sum(len(one["pictures"]) == 2 for one in told["asked"]["qwen"]) == 6


@pytest.mark.parametrize("name", ["llava-divprune", "qwen-divprune"])
def test_prompts_in_pieces_and_from_the_cache(asked: Path, told: dict[str, Any], name: str, tmp_path: Path) -> None:
    rounds = answers(asked, name, tmp_path / "said.json", IN_PIECES)
    check(told, name, rounds)
    assert sum(one["cached"] for one in rounds[1]) >= 64


def test_the_plug_in_is_loaded_in_every_process(asked: Path, told: dict[str, Any], tmp_path: Path) -> None:
    check(told, "llava-divprune", answers(asked, "llava-divprune", tmp_path / "said.json", processes=True))


def config(folder: Path, model: str, policy: Any, **options: Any) -> Any:
    """The checked config of an engine that is not started."""
    from ask_vllm import ARCHITECTURES
    from vllm.engine.arg_utils import EngineArgs

    overrides = {"architectures": [ARCHITECTURES[model]], "dropflow": policy}
    return EngineArgs(
        str(folder / model), dtype="float32", enforce_eager=True, max_model_len=512, hf_overrides=overrides, **options
    ).create_engine_config()


def processor(folder: Path, model: str, policy: Any, **options: Any) -> Any:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(config(folder, model, policy, **options).model_config)


def processed(made: Any, ids: list[int], pictures: list[Any], uuids: list[str] | None = None) -> Any:
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    items = made.info.parse_mm_data({"image": pictures})
    named = None if uuids is None else {"image": uuids}
    return made.apply(ProcessorInputs(ids, items, named), TimingContext(enabled=False))


def divprune(keep: int, positions: str = "persistent") -> dict[str, Any]:
    return {"name": "d", "positions": positions, "stages": {"d": {"use": "divprune/max-min", "keep": keep}}}


def test_the_key_of_an_image_holds_the_policy(asked: Path, told: dict[str, Any]) -> None:
    from PIL import Image

    one = told["asked"]["llava"][0]
    picture = Image.open(asked / one["pictures"][0])
    makers = [processor(asked, "llava", divprune(keep)) for keep in (36, 37, 36)]
    for uuids in (None, ["mine"]):
        found = [processed(made, one["ids"], [picture], uuids) for made in makers]
        first, second, third = (each["mm_hashes"]["image"] for each in found)
        assert first != second
        assert first == third
        assert first != ["mine"]


def test_registering_again_changes_nothing() -> None:
    from vllm import ModelRegistry
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    import dropflow_vllm

    dropflow_vllm.register()
    before, load = ModelRegistry.models.copy(), CPUModelRunner.load_model
    dropflow_vllm.register()
    assert ModelRegistry.models == before
    assert CPUModelRunner.load_model is load
    assert set(dropflow_vllm.ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())


@pytest.mark.parametrize(
    ("model", "policy", "options", "message"),
    [
        ("llava", HIDROP, {}, "stages.exit: decides at which layer vision leaves the LLM, which vLLM leaves to nobody"),
        ("llava", None, {}, "dropflow: expected the name or path of a policy"),
        ("llava", divprune(0), {}, "leaves no token of an image of 12 x 12 patches"),
        ("llava", divprune(9), {"video_pruning_rate": 0.5}, "video_pruning_rate: a policy with"),
        ("qwen", divprune(9, "compact"), {}, "positions: `compact` renumbers one position per token"),
    ],
)
def test_a_server_does_not_start_with(
    asked: Path, model: str, policy: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(asked, model, policy, **options)


def test_requests_that_are_refused(asked: Path, told: dict[str, Any]) -> None:
    import torch
    from PIL import Image

    (one,) = [one for one in told["asked"]["llava"] if len(one["pictures"]) == 2][:1]
    pictures = [Image.open(asked / name) for name in one["pictures"]]
    made, image = processor(asked, "llava", divprune(36), enable_mm_embeds=True), 4
    with pytest.raises(ValueError, match="followed by no text"):
        processed(made, [1, image, image, 9], pictures)
    with pytest.raises(ValueError, match="followed by no text"):
        processed(made, [1, image], pictures[:1])
    with pytest.raises(ValueError, match="embeddings were encoded elsewhere"):
        processed(made, [1, image, 9], [torch.zeros(36, 128)])
    many = [1] + [image, 9] * 20
    with pytest.raises(ValueError, match="2160 positions of this prompt's images have no token"):
        processed(made, many, pictures[:1] * 20)
    assert processor(asked, "qwen", divprune(3)).info.get_supported_mm_limits() == {"image": None}

"""What is written in `--model_args` and in tasks is understood, or refused by name; needs no lmms-eval."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch.multiprocessing as processes

from dropflow.errors import DropflowError
from dropflow_lab.errors import InputError
from dropflow_lab.measure.prefill import Prefill
from dropflow_lmms.arguments import read_arguments
from dropflow_lmms.documents import Document, conversation, grouped, pads
from dropflow_lmms.failing import ending_the_run
from dropflow_lmms.generation import Generation
from dropflow_lmms.totals import Totals

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def test_arguments() -> None:
    found = read_arguments(
        {
            "pretrained": "some/model",
            "policy": "hidrop-64",
            "overrides": "rescale=true; stages.inject.at=4;",
            "batch_size": "8",
            "max_batch_size": None,
            "device": "cpu",
            "dtype": "float16",
            "num_frames": 8,
        }
    )
    assert found.overrides == ("rescale=true", "stages.inject.at=4")
    assert (found.batch_size, found.device, found.dense) == (8, "cpu", False)
    assert found.loading == {"dtype": "float16"}
    assert found.sampling == {"num_frames": 8}
    assert read_arguments({"pretrained": "m", "max_batch_size": 4}).policy is None
    assert [read_arguments({"pretrained": "m", "policy": name}).dense for name in ("none", "dense")] == [True, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "model_args: pretrained: missing; name a folder"),
        ({"pretrained": "m", "polcy": "p"}, "model_args: polcy: no such argument; did you mean 'policy'"),
        ({"pretrained": "m", "batch_size": "auto"}, "model_args: batch_size: .*got 'auto'"),
        ({"pretrained": "m", "dtype": "int8"}, "model_args: dtype: .*got 'int8'"),
        ({"pretrained": "m", "policy": "none", "overrides": "a=1"}, "no policy to override with policy=none"),
        (
            {"pretrained": "m", "device": "cpu", "device_map": "auto"},
            "device and device_map exclude each other",
        ),
        ({"pretrained": "m", "fps": 1, "num_frames": 4}, "num_frames and fps exclude each other"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_arguments(given)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"max_new_tokens": 1024, **GREEDY}),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, None),
        ({"max_gen_toks": 5, "image_aspect_ratio": "original"}, {"max_new_tokens": 5, **GREEDY}),
        (
            {"temperature": 0.2, "top_p": 0.9},
            {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.2, "top_p": 0.9},
        ),
        ({"temperature": 0.2, "do_sample": False}, {"max_new_tokens": 1024, **GREEDY}),
        ({"do_sample": True, "temperature": 0}, {"max_new_tokens": 1024, **GREEDY}),
        ({"do_sample": True}, {"max_new_tokens": 1024, "do_sample": True}),
    ],
)
def test_settings_of_generation(given: dict[str, Any], options: dict[str, Any] | None) -> None:
    assert Generation.of(given).options == (options or {"max_new_tokens": 16, "num_beams": 1, **GREEDY})


def test_an_answer_ends_at_the_first_stop_text() -> None:
    generation = Generation.of({"until": ["\n\n", "###", ""]})
    assert generation.cut(" a dog\n\nand ### more") == "a dog"
    assert Generation.of({"until": "###"}).cut("a ### b") == "a"
    assert Generation.of({}).cut(" a\n\nb ") == "a\n\nb"
    with pytest.raises(InputError, match="generation_kwargs: num_beam: not supported; did you mean 'num_beams'"):
        Generation.of({"num_beam": 2})


def test_documents_are_grouped_by_how_their_answers_are_generated() -> None:
    def document(**generation: Any) -> Document:
        return Document(("", None, generation, 0, "task", "test"), {"task": {"test": [{}]}})

    first, other, again = document(max_new_tokens=4), document(max_new_tokens=8), document(max_new_tokens=4, until=[])
    assert list(grouped([first, other, again]).values()) == [[0, 2], [1]]
    assert pads(SimpleNamespace(metadata={"__padding_only__": True}))
    assert not pads(SimpleNamespace(metadata={"task": "t"}))
    assert not pads(SimpleNamespace(metadata=None))


def test_messages_keep_pictures_and_videos_in_their_order() -> None:
    content = [
        {"type": "text", "text": "first"},
        {"type": "image", "url": "a.png"},
        {"type": "video", "url": "b.mp4", "start_time": None},
        {"type": "text", "text": "what ?"},
    ]
    asked = conversation([{"role": "system", "content": "be brief"}, {"role": "user", "content": content}], "t")
    assert asked == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "first"},
                {"type": "image", "image": "a.png"},
                {"type": "video", "video": "b.mp4"},
                {"type": "text", "text": "what ?"},
            ],
        },
    ]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, "task: document 3: expected text, pictures and videos, got 'audio'"),
        ({"type": "video", "url": "a.mp4", "end_time": 4.0}, "task: document 3: .* got one with end_time"),
        ({"type": "video", "url": {"video_start": 1, "path": "a"}}, "task: document 3: .* path, video_start"),
    ],
)
def test_what_would_be_ignored_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        conversation([{"role": "user", "content": [part]}], "task: document 3")


def test_rounds_end_when_the_task_says_so() -> None:
    def asked(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": text}]}]

    def messages(doc: Any, round_idx: int | None = None, previous_output: Any = None, previous_round_info: Any = None):
        if round_idx is None:
            return asked(doc["question"])
        told = (previous_round_info or 0) + 1
        return asked(f"{previous_output[-1]} and {told}"), round_idx == 3, previous_output, told

    document = Document(("", messages, {}, 0, "task", "test"), {"task": {"test": [{"question": "what ?"}]}})
    assert document.first() == asked("what ?")
    document.said.append("a")
    assert document.next() == asked("a and 1")
    document.said.append("b")
    assert document.next() == asked("b and 2")
    document.said.append("c")
    assert document.next() is None


def test_errors_end_the_command_line_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "lmms_eval.__main__", raising=False)
    with pytest.raises(InputError, match="wrong"), ending_the_run():
        raise InputError("wrong")
    monkeypatch.setitem(sys.modules, "lmms_eval.__main__", sys)
    with pytest.raises(SystemExit, match=r"^error: wrong$"), ending_the_run():
        raise InputError("wrong")
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match=r"^error: a bug$"), ending_the_run():
        raise ZeroDivisionError("a bug")
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err
    assert issubclass(InputError, DropflowError)


def test_means_are_over_the_prompts_of_all_processes(tmp_path) -> None:
    one = Totals(Prefill(3, 30, 24, 300, 6, 12, 9, 18), 5, 1.0)
    assert one.gathered() == one
    processes.start_processes(_gathers, (str(tmp_path / "store"),), nprocs=2, start_method="fork")


def _gathers(rank: int, store: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = (
        Totals(Prefill(3, 30, 24, 300, 6, 12, 9, 18), 5, 1.0)
        if rank
        else Totals(Prefill(1, 2, 4, 4, 2, 4, 3, 6), 1, 0.5)
    )
    found = own.gathered()
    assert found == Totals(Prefill(4, 32, 28, 304, 8, 16, 12, 24), 6, 1.5)
    assert found.metrics() == {
        "visual_tokens_per_layer": 8.0,
        "visual_tokens_at_entry": 76.0,
        "prefill_multiply_adds": 2.0,
        "prefill_multiply_adds_dense": 4.0,
        "kv_bytes": 3.0,
        "kv_bytes_dense": 6.0,
        "prompts_of_all_ranks": 4,
    }
    dist.destroy_process_group()


def test_without_lmms_eval_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "dropflow_lmms.model", raising=False)
    with pytest.raises(ImportError, match=r"^dropflow_lmms\.model needs lmms-eval: pip install 'dropflow\[lmms\]'$"):
        __import__("dropflow_lmms.model")

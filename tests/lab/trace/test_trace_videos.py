"""Traces of videos: frames have a time, rows merged across frames say so and are made again, a slider shows them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_tracing import STEPS, Words
from tiny import policy

import dropflow
from dropflow import load_policy
from dropflow.backbone.image_layout import ImageLayout
from dropflow.testing import END, START, VIDEO, Picture, tiny_models
from dropflow.testing.families.qwen2_vl import packed
from dropflow_lab.trace import Trace, drop_patches, keep_patches, page, record_inputs, replay_policy
from dropflow_lab.trace.follow import GONE, follow, merged_elsewhere

FOLDS = {"use": "holitom/folding", "at": 3, "keep": 0.4}
POLICIES: dict[str, dict[str, Any]] = {
    "rows dropped": policy(evs={"use": "evs/retention", "rate": 0.5}),
    "trees over time": policy(
        merge={"use": "flashvid/tree-merging", "retention": 0.4, "fewest_segments": 1, "segment_threshold": -1.0}
        | {"merge_threshold": 0.0},
        rank={"use": "flashvid/late-rank", "at": 4, "keep": 0.5},
    ),
    "static places, and folding inside the LLM": policy(
        merge={"use": "holitom/merging", "retention": 0.6, "threshold": 0.0}, fold=FOLDS
    ),
    "folding alone": policy(fold=FOLDS),
}
FRAMES, ROWS = 4, 6


def prompt() -> tuple[Any, dict[str, Any]]:
    """A tiny Qwen2.5-VL and a prompt with a video of four time steps of 2 x 3 tokens."""
    tiny = tiny_models()["qwen2_5_vl"][1]

    def video(_: int, dice: torch.Generator) -> Picture:
        ids = [START, *[VIDEO] * (ROWS * FRAMES), END]
        return Picture(ids, packed("video", FRAMES, 4, 6, dice), [ImageLayout(ROWS, (2, 3))] * FRAMES)

    tiny = replace(tiny, pictures={**tiny.pictures, "video": video})
    model = tiny.model()
    model.generation_config.eos_token_id = None
    return model, tiny.prompt([(3, "V", 5)])[0]


def traced(which: dict[str, Any]) -> tuple[Any, dict[str, Any], Trace]:
    model, inputs = prompt()
    return model, inputs, record_inputs(model, Words, inputs, [load_policy(which)], STEPS)


@torch.no_grad()
def generated(model: Any, inputs: Any, which: Any) -> tuple[list[int], torch.Tensor]:
    with dropflow.attach(model, which):
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[0].tolist(), torch.stack(out.logits)


@pytest.mark.parametrize("which", POLICIES.values(), ids=POLICIES)
def test_a_replay_of_a_video_gives_the_same_tokens_and_the_same_trace(which: dict[str, Any]) -> None:
    model, inputs, trace = traced(which)
    assert trace.prompt.videos == [[0, 1, 2, 3]]
    tokens, logits = generated(model, inputs, which)
    again, forced = generated(model, inputs, replay_policy(trace))
    assert again == tokens
    torch.testing.assert_close(forced, logits, rtol=1e-5, atol=1e-5)
    other = record_inputs(model, Words, inputs, [replay_policy(trace)], STEPS)
    assert other.runs[0].encode[-1:] == [
        step.model_copy(update={"images": [own.model_copy(update={"scores": None}) for own in step.images]})
        for step in trace.runs[0].encode[-1:]
    ]
    assert [boundary.merged for boundary in other.runs[0].boundaries] == [b.merged for b in trace.runs[0].boundaries]
    assert [boundary.kept for boundary in other.runs[0].boundaries] == [b.kept for b in trace.runs[0].boundaries]


def test_patches_in_rows_of_other_frames_are_followed_there() -> None:
    _, _, trace = traced(POLICIES["trees over time"])
    run, found = trace.runs[0], 0
    for image in range(FRAMES):
        followed = follow(trace, run, image)
        assert {patch for patch, place in enumerate(followed.entering) if place == GONE} == set(followed.away)
        for patch, (home, place) in followed.away.items():
            merge = next(own for own in run.encode[0].images[home].merged or () if own.into == place)
            assert (patch, image) in merge.sources(home)
            assert home < image, "trees have their roots in earlier frames"
            found += 1
    assert found > 0


def test_states_folded_into_other_frames_are_told() -> None:
    _, _, trace = traced(POLICIES["folding alone"])
    (boundary,) = trace.runs[0].boundaries
    elsewhere = [merged_elsewhere(boundary, image) for image in range(FRAMES)]
    assert sum(map(len, elsewhere)) > 0
    assert sum(map(len, boundary.kept)) == round(ROWS * FRAMES * 0.4)
    for image, own in enumerate(elsewhere):
        assert not set(own) & set(boundary.kept[image])
        assert all(place in boundary.kept[home] for home, place in own.values())


def test_what_if_a_patch_merged_into_another_frame_had_stayed_or_gone() -> None:
    model, inputs, trace = traced(POLICIES["folding alone"])
    image, patch = next((i, p) for i in range(FRAMES) for p in merged_elsewhere(trace.runs[0].boundaries[0], i))
    kept = keep_patches(trace, [patch], image)
    assert patch in kept.runs[0].boundaries[0].kept[image]
    assert not merged_elsewhere(kept.runs[0].boundaries[0], image).get(patch)
    dropped = drop_patches(trace, [patch], image)
    for edited in (kept, dropped):
        assert generated(model, inputs, replay_policy(edited))[0][:5] == inputs["input_ids"][0, :5].tolist()


def test_faults_of_frames_in_a_file_are_named() -> None:
    _, _, trace = traced(POLICIES["folding alone"])
    data = trace.model_dump()
    data["prompt"]["videos"] = [[0, 1], [1]]
    with pytest.raises(ValueError, match=r"prompt\.videos: expected every frame once, among the images"):
        Trace.model_validate(data)
    data = trace.model_dump()
    merges = next(own for own in data["runs"][0]["boundaries"][0]["merged"] if own)
    merges[0]["images"] = [9] * len(merges[0]["of"])
    with pytest.raises(ValueError, match=r"merged\.\d: image 9, but there are 4"):
        Trace.model_validate(data)
    merges[0]["images"] = [0] * (len(merges[0]["of"]) + 1)
    with pytest.raises(ValueError, match="expected an image for each of `of`, or no `images`"):
        Trace.model_validate(data)


def test_the_time_slider_shows_one_frame_after_the_other(tmp_path: Path, opened: Any) -> None:
    _, _, trace = traced(POLICIES["folding alone"])
    file = tmp_path / "trace.html"
    file.write_text(page(trace), encoding="utf-8")
    tab, noticed = opened(file)
    boundary = trace.runs[0].boundaries[0]
    tab.focus("#layer")
    tab.keyboard.press("End")
    tab.focus("#time")
    tab.keyboard.press("Home")
    for frame in range(FRAMES):
        assert tab.input_value("#time") == str(frame)
        maps = tab.locator("canvas.map").all()
        assert [number for number, own in enumerate(maps) if own.is_visible()] == [frame]
        assert f"frame {frame} of 4" in maps[frame].get_attribute("aria-label")
        assert int(maps[frame].get_attribute("data-live")) == len(boundary.kept[frame])
        for patch, (home, place) in merged_elsewhere(boundary, frame).items():
            tab.focus("canvas.map:visible")
            tab.keyboard.press("Home")
            for _ in range(patch):
                tab.keyboard.press("ArrowRight")
            said = tab.locator(".detail").text_content()
            assert said.startswith(f"Image {frame} (frame {frame} of 4), patch {patch}: merged into patch {place} of ")
            assert f"of image {home} at boundary 3 by fold" in said
            break
        tab.focus("#time")
        tab.keyboard.press("ArrowRight")
    assert "merged into another frame" in tab.locator("#legend").text_content()
    assert not noticed

"""The page of a trace: small, closed to the network, and right when driven in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab_tracing import EVICTS, Words
from PIL import Image
from tiny import policy, prompt, tiny_llava

from dropflow import load_policy
from dropflow_lab.digits.checkpoints.model import load, sample_image
from dropflow_lab.trace import Trace, page, record, record_inputs
from dropflow_lab.trace.pictures import seen_pictures

HOSTILE = "</script><script>document.title = 'broken in'</script><img src=x onerror=alert(1)> <!-- &amp; {{data}}"


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


SPARSE = {"use": "sparsevlm/text-guided", "recycle_share": 1.0, "cluster_size": 4}
"""Everything that goes is merged."""


@pytest.mark.parametrize(
    "keeps",
    [
        [
            policy(r={"use": "control/random", "keep": {b: 570 - 15 * b for b in range(2, 32, 3)}}),
            policy(p={"use": "hidrop/concave-pyramid", "keep": {b: 560 - 15 * b for b in range(1, 32, 3)}}),
        ],
        [
            policy(s=SPARSE | {"keep": {b: 560 - 15 * b for b in range(1, 32, 3)}}),
            policy(t={"use": "tome/token-merging", "r": 60, "layers": 3}),
        ],
    ],
    ids=["dropping", "merging"],
)
def test_a_page_of_576_tokens_and_two_policies_is_small_even_with_noise(keeps: list[dict[str, Any]]) -> None:
    model, inputs = tiny_llava(layers=32, grid=24), prompt(((3, "I", 5),), grid=24)
    trace = record_inputs(model, Words, inputs, [load_policy(which) for which in keeps], 8)
    text = page(trace, [noise(672)])
    assert len(text.encode()) < 300_000
    assert text.count("data:image/") == 1


def test_no_text_of_a_trace_becomes_markup_and_nothing_is_fetched() -> None:
    _, _, trace = traced_digits(HOSTILE)
    text = page(trace)
    assert "broken in" in text
    assert "</script><script>" not in text
    assert text.count("</script>") == text.count("<script") == 2
    assert "<img" not in text
    assert re.search(r"Content-Security-Policy\"\s+content=\"default-src 'none'", text)
    template = text.replace(text.split('id="data">')[1].split("</script>")[0], "")
    assert not re.findall(r"(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)", template)


def test_pictures_are_those_the_model_saw() -> None:
    _, processor = load()
    wide = Image.new("RGB", (200, 100), (200, 40, 40))
    (seen,) = seen_pictures(processor, [wide], "what digit is red ?", 1)
    assert seen is not None
    assert seen.size == (96, 96)  # resized and cropped
    assert seen.getpixel((48, 48)) == (200, 40, 40)
    assert seen_pictures(processor, [wide], "what digit is red ?", 3) == [None] * 3


def traced_digits(question: str = "read all digits row by row .") -> tuple[Any, Any, Trace]:
    model, processor = load()
    evicting = load_policy(
        policy(**EVICTS) | {"name": "evicting"}, ["stages.filter.keep.2=60", "stages.cache.budget=20"]
    )
    return model, processor, record(
        model, processor, [sample_image()], question, [load_policy("mixed-digits"), evicting], 4
    )  # fmt: skip


# In a browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, opened: Any) -> tuple[Any, Trace, list[str]]:
    """A page of two policies, one of which evicts while decoding; its trace, and everything it complained of."""
    model, processor, trace = traced_digits()
    model.generation_config.eos_token_id = None
    trace = trace.model_copy(update={"prompt": trace.prompt.model_copy(update={"question": HOSTILE})})
    file: Path = tmp_path_factory.mktemp("page") / "trace.html"
    pictures = seen_pictures(processor, [sample_image()], "what digit is red ?", 1)
    file.write_text(page(trace, pictures), encoding="utf-8")
    tab, noticed = opened(file)
    return tab, trace, noticed


def numbers(tab: Any, selector: str) -> list[int]:
    return [int(text) for text in tab.locator(selector).all_text_contents()]


def live_patches(trace: Trace, number: int, layer: int) -> int:
    """Patches of the only image that are live before a layer, by the trace."""
    run = trace.runs[number]
    if not run.entry <= layer < run.exit:
        return 0
    kept = [boundary.kept[0] for boundary in run.boundaries if boundary.boundary <= layer]
    return len(kept[-1] if kept else trace.entering(run)[0])


def test_the_slider_moves_by_keys_and_the_counts_are_the_traces(shown: Any) -> None:
    tab, trace, _ = shown
    tab.focus("#moment")
    tab.keyboard.press("Home")
    tab.focus("#layer")
    tab.keyboard.press("Home")
    for layer in range(trace.depth):
        assert tab.input_value("#layer") == str(layer)
        assert numbers(tab, ".visual") == [run.layers[layer].visual_tokens for run in trace.runs]
        assert numbers(tab, ".kv") == [run.layers[layer].kv_entries for run in trace.runs]
        drawn = [int(map.get_attribute("data-live")) for map in tab.locator("canvas.map").all()]
        assert drawn == [live_patches(trace, number, layer) for number in range(2)]
        tab.keyboard.press("ArrowRight")
    assert tab.input_value("#layer") == str(trace.depth - 1)


def test_moments_show_the_caches_of_every_call(shown: Any) -> None:
    tab, trace, _ = shown
    tab.evaluate("document.getElementById('layer').value = 3")
    tab.focus("#moment")
    tab.keyboard.press("Home")
    for moment in range(len(trace.runs[1].calls)):
        tab.keyboard.press("ArrowRight")
        held = [run.calls[min(moment, len(run.calls) - 1)].kv_entries[3] for run in trace.runs]
        assert numbers(tab, ".kv") == held
    evicted = {token for call in trace.runs[1].calls for e in call.evicted if 3 in e.layers for token in e.tokens}
    assert int(tab.locator("canvas.map").nth(1).get_attribute("data-live")) == 60 - len(evicted)


def test_the_keyboard_reaches_everything_in_order(shown: Any) -> None:
    tab, _, _ = shown
    tab.focus("#layer")
    seen = []
    for _ in range(9):
        seen.append(tab.evaluate("document.activeElement.id || document.activeElement.localName"))
        tab.keyboard.press("Tab")
    assert seen == ["layer", "moment", "view-0", "canvas", "summary", "view-1", "canvas", "summary", "body"]


def test_arrow_keys_go_from_patch_to_patch_and_say_what_became_of_it(shown: Any) -> None:
    tab, trace, _ = shown
    tab.evaluate("document.getElementById('layer').value = 11")
    run = trace.runs[0]
    merged = next(own for own in run.encode[0].images[0].merged or () if own.into not in run.boundaries[0].kept[0])
    patch = merged.of[0]
    tab.locator("canvas.map").first.focus()
    tab.keyboard.press("Home")
    for _ in range(patch // 12):
        tab.keyboard.press("ArrowDown")
    for _ in range(patch % 12):
        tab.keyboard.press("ArrowRight")
    told = tab.locator("[role=status]").first.text_content()
    assert told.startswith(f"Image 0, patch {patch}: dropped at boundary 6 by pyramid.")
    tab.evaluate("document.getElementById('layer').value = 0")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowLeft")
    assert "merged: 9 patches are one token" in tab.locator("[role=status]").first.text_content()


def test_scores_can_be_shown_and_everything_has_a_name(shown: Any) -> None:
    tab, _, noticed = shown
    options = tab.locator("#view-0 option").all_text_contents()
    assert options[:2] == ["survivors", "scores of merge at vision boundary 1"]
    assert options[-1] == "scores of pyramid at boundary 9"
    before = tab.locator("canvas.map").first.screenshot()
    tab.select_option("#view-0", label=options[-1])
    assert tab.locator("canvas.map").first.screenshot() != before
    assert "coloured by rank" in tab.locator(".scale").first.text_content()
    tab.emulate_media(color_scheme="dark")
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('canvas.map, svg, section, select')].filter("
        "(node) => !node.ariaLabel && !node.hasAttribute('aria-labelledby') && !node.labels?.length).length"
    )
    assert unnamed == 0
    assert tab.locator("#question").text_content() == HOSTILE
    assert tab.title() == "Dropflow trace"
    assert noticed == []

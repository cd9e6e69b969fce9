"""What is measured of every layer, against the eager model's own hidden states and attention maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dropflow import PruneCall
from dropflow.backbone.backbone import backbone_for
from dropflow.testing import tiny_models
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import Picture, Sample, read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.profile.layers import LayerMeter, other_pictures
from dropflow_lab.profile.measures import cross_modal_similarity, ilvas, intra_modal_similarity
from dropflow_lab.profile.observe import Groups, watching

LAYERS = 4


@pytest.fixture(scope="module")
def loaded(model_folder) -> Any:
    return load_model(model_folder)


@torch.no_grad()
def eager(loaded: Any, sample: Sample, pictures: Sample) -> Any:
    """States and maps of one prompt alone, by the eager model, and which tokens are visual."""
    model, processor = loaded
    model.set_attn_implementation("eager")
    inputs = build_inputs(processor, [(pictures.images(), sample.question)]).to(model.device, model.dtype)
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return out, inputs["input_ids"][0] == model.config.image_token_id


def test_curves_of_a_padded_batch_equal_those_of_each_prompt_alone(loaded) -> None:
    samples = read_samples("digits", 3, 2)
    meter = LayerMeter(*loaded, 0.1, (1, 2))
    meter.measure(samples)
    curves = meter.curves()
    intra: dict[str, list[Any]] = {"system": [], "visual": [], "instruction": []}
    similar: dict[int, list[Any]] = {1: [], 2: []}
    for sample in samples:
        out, visual = eager(loaded, sample, sample)
        first, last = visual.nonzero()[0].item(), visual.nonzero()[-1].item()
        place = torch.arange(len(visual))
        groups = {"system": place < first, "visual": visual, "instruction": place > last}
        states = out.hidden_states  # the last one lies after the final norm
        for name, own in groups.items():
            pairs = [intra_modal_similarity(states[i], states[i + 1], own[None]) for i in range(LAYERS - 1)]
            intra[name].append(torch.cat(pairs))
        rows = [attention[:, :, -1] for attention in out.attentions]
        for n in similar:
            found = [ilvas(rows[i], rows[i + n], visual[None], 0.1) for i in range(LAYERS - n)]
            similar[n].append(torch.cat(found))
    for name, values in intra.items():
        assert curves.intra[name] == pytest.approx(torch.stack(values).mean(0).tolist(), abs=2e-3)  # bfloat16 weights
    for n, values in similar.items():
        assert curves.ilvas[n] == pytest.approx(torch.stack(values).mean(0).tolist(), abs=2e-3)
    assert curves.visual_tokens == 144


def test_cross_modal_similarity_asks_about_other_pictures(loaded) -> None:
    samples = read_samples("digits", 4, 2)
    others = other_pictures(samples)
    meter = LayerMeter(*loaded, 0.1, (1,))
    meter.measure_across(samples, [None if i is None else samples[i] for i in others], samples[0])
    expected = []
    for i, other in enumerate(others):
        if i == 0 or other is None:
            continue
        out, visual = eager(loaded, samples[i], samples[other])
        reference, _ = eager(loaded, samples[i], samples[0])
        end = visual.nonzero()[-1].item() + 1
        pairs = zip(out.hidden_states[:LAYERS], reference.hidden_states[:LAYERS], strict=True)
        expected.append(torch.stack([cross_modal_similarity(one[0, end:], two[0, end:]) for one, two in pairs]))
    cross = meter.curves().cross
    assert cross == pytest.approx(torch.stack(expected).mean(0).tolist(), abs=2e-3)
    assert cross[0] == pytest.approx(1.0)  # before the first layer nothing has reached the text


def test_other_pictures_are_neither_own_nor_the_first() -> None:
    def sample(*names: str) -> Sample:
        return Sample(tuple(Picture(name, lambda: pytest.fail("opened")) for name in names), "?")

    samples = [sample("a"), sample("b"), sample("a"), sample("a", "b"), sample("b")]
    assert other_pictures(samples) == [1, 3, 3, 4, 3]
    assert other_pictures([sample("a"), sample("b")]) == [1, None]
    assert other_pictures([sample("a"), sample("a")]) == [None, None]


def test_two_pictures_alone_have_no_cross_modal_similarity(loaded) -> None:
    samples = read_samples("digits", 2, 2)
    meter = LayerMeter(*loaded, 0.1, (1,))
    meter.measure_across(samples, [samples[1], None], samples[0])
    assert meter.curves().cross == ()


def test_a_prompt_without_visual_tokens_is_refused(loaded) -> None:
    with pytest.raises(InputError, match="expected visual tokens in the prompt"):
        LayerMeter(*loaded, 0.1, (1,)).measure([Sample((), "is there a 7 ?")])


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "llava_next", "qwen2_5_vl"])
def test_any_family_shows_its_states_in_front_of_every_layer(family) -> None:
    tiny = tiny_models()[family][1]
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5), (1, "I", 2, "I", 9)])
    states = model(**inputs, output_hidden_states=True).hidden_states
    seen: list[PruneCall] = []
    with watching(model, seen.append):
        backbone_for(model).core(**inputs, use_cache=False)
    assert [call.boundary for call in seen] == list(range(6))
    real = inputs["attention_mask"].bool()
    for call in seen:
        torch.testing.assert_close(call.hidden[real], states[call.boundary][real])
    groups = Groups.of(seen[0])
    assert groups.instruction.sum(1).tolist() == [5 + (family != "llava_next"), 9 + (family != "llava_next")]
    assert not (groups.system & groups.visual | groups.visual & groups.instruction).any()

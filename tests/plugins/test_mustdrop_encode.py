"""MustDrop inside the vision tower: recorded features and key sets, and what the published code could not do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from mustdrop_goldens import golden, recorded_llava, recorded_names
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from torch import Tensor

import dropflow
from dropflow.errors import DecisionError, PolicyError
from dropflow.testing import MaskedOracle
from dropflow_mustdrop.key_set import key_indices

MERGE = {"use": "mustdrop/spatial-merge"}
KEYS = {"use": "mustdrop/key-set"}
CASES = [(name, case) for name in recorded_names("vision_tower*") for case in golden(name).cases()]


@contextmanager
def vision_layers(model: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collects what the layers of the tower get and give."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = []
    for layer in model.model.vision_tower.encoder._modules["layers"]:
        handles.append(layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
        handles.append(layer.register_forward_hook(lambda _, __, output: outputs.append(output)))
    yield inputs, outputs
    for handle in handles:
        handle.remove()


@contextmanager
def projected(model: Any) -> Iterator[list[Tensor]]:
    """Collects what the projector gets."""
    seen: list[Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    yield seen
    handle.remove()


@pytest.mark.parametrize(("name", "case"), CASES, ids=[case for _, case in CASES])
@torch.no_grad()
def test_recorded_towers(name: str, case: str) -> None:
    recorded, model = golden(name), recorded_llava(50)
    pixels = recorded[f"{case}/pixel_values"]
    images = len(pixels)
    inputs = prompt([("I",) * images + (3,)], grid=12)
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = 50
    inputs["input_ids"][0, -3:] = torch.tensor([7, 8, 9])
    inputs["pixel_values"] = pixels
    which = policy(merge=MERGE | {"count": "reference"}, keys=KEYS)
    with dropflow.attach(model, which) as flow, vision_layers(model) as (got, gave), projected(model) as features:
        model(**inputs)
        record = flow._last().prompt
    for value, key in (
        (got[0], "layer0_in"),
        (gave[0], "layer0_out_premerge"),
        (got[1], "layer1_in_merged"),
        (got[23], "layer23_in"),
        (gave[23], "layer23_out"),
        (features[0], "selected_features"),
    ):
        expected = recorded[f"{case}/{key}"]
        assert value.shape == expected.shape
        assert relative_error(value, expected) < 1e-4, key
    rows = got[1].shape[1] - 1
    assert rows == 144 - 8 * recorded[f"{case}/r"]
    visual = record.image_id[0] >= 0
    present, protected = (mask[0][visual].view(images, 144) for mask in (record.present, record.protected))
    assert torch.equal(present, (torch.arange(144) < rows).expand(images, -1))  # merged tokens first, the rest after
    for image in range(images):
        expected = recorded[f"{case}/key_index"][image].sort().values
        assert torch.equal(protected[image].nonzero()[:, 0], expected)


@torch.no_grad()
def test_recorded_row_of_cls() -> None:
    model, recorded = recorded_llava(50), golden("vision_tower")
    rows: list[tuple[Tensor, ...]] = []

    class Look(dropflow.Stage[Any]):
        vision_taps = (-1,)

        @dropflow.hookimpl
        def encode(self, call: dropflow.EncodeCall) -> None:
            rows.append(call.cls_attention(-1))
            rows.append(tuple(call.attention_rows(23, torch.zeros(1, 1).long())[0, :, 0, 1:]))

    with dropflow.attach(model, policy(merge=MERGE, look={"use": Look})):
        model.get_image_features(recorded["img2/pixel_values"])
    (mean,), heads = rows
    assert relative_error(mean, recorded["img2/cls_attn_mean"][0]) < 1e-4
    assert relative_error(torch.stack(heads), recorded["img2/cls_attn_per_head"][0]) < 1e-4
    assert torch.equal(key_indices(mean, 0.08), recorded["img2/key_index"][0])


@torch.no_grad()
def test_images_of_a_call_do_not_change_each_other() -> None:
    model, recorded = recorded_llava(50), golden("vision_tower")
    pixels = recorded["batch3/pixel_values"]
    with dropflow.attach(model, policy(merge=MERGE, keys=KEYS)):
        together = model.get_image_features(pixels)
        for image in range(3):
            alone = model.get_image_features(pixels[image : image + 1])
            count = 144 - 8 * recorded[f"img{image}/r"]
            for output, row in ((together, image), (alone, 0)):
                flags = output.deepstack_features[-1][row]
                assert torch.equal(flags[:, 0].bool(), torch.arange(144) < count)
                assert flags[:, 1].sum() == math.ceil(0.08 * count)
            assert torch.equal(together.deepstack_features[-1][image][:, 1], alone.deepstack_features[-1][0][:, 1])
            assert relative_error(together.pooler_output[image], alone.pooler_output[0]) < 1e-5


@torch.no_grad()
def test_raster_order_is_a_permutation_that_keeps_each_token_at_its_window() -> None:
    model, recorded = recorded_llava(50), golden("vision_tower")
    pixels, order = recorded["img0/pixel_values"], recorded["img0/window_order"][0]
    features = {}
    for name in ("reference", "raster"):
        with dropflow.attach(model, policy(merge=MERGE | {"order": name})):
            output = model.get_image_features(pixels)
            features[name] = output.pooler_output[0]
            places = output.deepstack_features[-1][0][:, 0].nonzero()[:, 0]
    last = 36 * (order // 4) + 24 + 3 * (order % 4) + 2  # bottom-right patch of window (order // 4, order % 4)
    assert torch.isin(last, places).all()
    assert relative_error(features["raster"][last], features["reference"][: len(last)]) < 1e-4
    rest = places[~torch.isin(places, last)]
    assert relative_error(features["raster"][rest], features["reference"][len(last) : len(places)]) < 1e-4


@pytest.mark.parametrize(("budget", "windows"), [(192, 0), (144, 0), (137, 0), (136, 1), (100, 5), (0.5, 9), (1, 16)])
@torch.no_grad()
def test_a_budget_is_met_from_above(budget: int | float, windows: int) -> None:
    model, recorded = recorded_llava(50), golden("vision_tower")
    with dropflow.attach(model, policy(merge=MERGE | {"budget": budget})) as flow:
        flags = model.get_image_features(recorded["batch3/pixel_values"]).deepstack_features[-1]
        assert [int(own[:, 0].sum()) for own in flags] == [144 - 8 * windows] * 3
        assert flow.plan.schedule().entry == 144 - 8 * windows


@torch.no_grad()
def test_nothing_to_merge_is_bit_identical() -> None:
    model, pixels = recorded_llava(50), golden("vision_tower")["img0/pixel_values"]
    plain = model.get_image_features(pixels).pooler_output[0]
    with dropflow.attach(model, policy(merge=MERGE | {"threshold": 1.0})) as flow:
        assert torch.equal(model.get_image_features(pixels).pooler_output[0], plain)
        assert flow.plan.schedule().per_layer == (None,) * 32  # a threshold leaves it to the data


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_towers_without_cls_rank_by_received_attention(attention: str) -> None:
    model, inputs = tiny_llava(tower="siglip", attention=attention, grid=6), prompt(grid=6)
    merge = MERGE | {"threshold": 0.05}
    which = policy(merge=merge, keys=KEYS | {"share": 0.3, "layer": 3})
    with dropflow.attach(model, which) as flow, vision_layers(model) as (got, _):
        model(**inputs)
        record = flow._last().prompt
    eager = tiny_llava(tower="siglip", attention="eager", grid=6).model.vision_tower
    layer = eager.encoder.layers[3]
    visual = [(record.image_id[row] == number).nonzero()[:, 0] for row, number in ((0, 0), (1, 1), (1, 2))]
    sizes = []
    for image, (row, slots) in enumerate(zip((0, 1, 1), visual, strict=True)):
        present = int(record.present[row, slots].sum())
        sizes.append(present)
        hidden = layer.layer_norm1(got[3][image : image + 1, :present])
        _, weights = layer.self_attn(hidden)
        expected = key_indices(weights[0].mean(0).mean(0), 0.3)
        assert torch.equal(record.protected[row, slots].nonzero()[:, 0], expected.sort().values)
    assert len(set(sizes)) > 1, "images of one size would not test padding"


@torch.no_grad()
def test_rows_dropped_since_the_ranking_layer_are_left_out() -> None:
    class EveryThird(dropflow.Stage[Any]):
        @dropflow.hookimpl
        def encode(self, call: dropflow.EncodeCall) -> dropflow.Encode:
            return dropflow.Encode(keep=tuple(places % 3 == 0 for places in call.places))

    model, inputs = tiny_llava(), prompt([(2, "I", 3)])
    eager = tiny_llava(attention="eager").model.vision_tower
    row = eager(inputs["pixel_values"], output_attentions=True).attentions[1][0, :, 0, 1:].mean(0)
    kept = torch.arange(0, 16, 3)
    with dropflow.attach(model, policy(drop={"use": EveryThird}, keys=KEYS | {"share": 0.5, "layer": 1})) as flow:
        model(**inputs)
        protected = flow._last().prompt.protected[0, 3:19]
    assert protected.nonzero()[:, 0].tolist() == sorted(kept[key_indices(row[kept], 0.5)].tolist())


def test_faults_are_named() -> None:
    model, inputs = tiny_llava(grid=6), prompt(grid=6)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (policy(merge=MERGE | {"at": 3}), PolicyError, r"stages\.merge: works at boundary 3 .* expected 0 to 2"),
        (policy(keys=KEYS | {"layer": 4}), PolicyError, r"stages\.keys: reads vision layer 4, .* 0 to 3"),
        (policy(merge=MERGE | {"window": [0, 3]}), PolicyError, r"stages\.merge\.window\.0: input should be greater"),
        (policy(merge=MERGE | {"budget": -1}), PolicyError, r"stages\.merge\.budget: expected a number of visual"),
    ]
    for which, error, message in cases:
        with pytest.raises(error, match=message):
            dropflow.attach(model, which)
    wide = policy(merge=MERGE | {"window": [7, 2]})
    twice = policy(a=MERGE | {"budget": 1}, b=MERGE | {"at": 2})
    for which, message in (
        (wide, r"stages\.merge: image 0 has a grid of \(6, 6\), smaller than one window of \(7, 2\)"),
        (twice, r"stages\.b: image 0 has 4 rows, expected those of its whole patch grid \(6, 6\)"),
    ):
        with dropflow.attach(model, which), pytest.raises(DecisionError, match=message), torch.no_grad():
            model(**inputs)


def test_gradients_reach_every_merged_patch_and_equal_the_masked_run() -> None:
    model, inputs = tiny_llava(grid=6).train(), prompt([(3, "I", 6)], grid=6)
    inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(46) < 43, -100)
    with dropflow.attach(model, policy(merge=MERGE | {"budget": 20}, keys=KEYS)) as flow:
        loss = model(**inputs).loss
        loss.backward()
        live = flow.live()
        features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    got = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert (live[0] & (inputs["input_ids"] == IMAGE)).sum() == 20
    assert got["model.vision_tower.embeddings.patch_embedding.weight"].abs().max() > 0
    assert (got["model.vision_tower.embeddings.position_embedding.weight"].abs().sum(1) > 0).all()
    model.zero_grad()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = embeds.masked_scatter((inputs["input_ids"] == IMAGE)[..., None], features)
    with MaskedOracle(model, live):
        expected = model(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], labels=inputs["labels"], use_cache=False
        ).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_merging_on_the_output_leaves_the_tower_alone() -> None:
    model, inputs = tiny_llava(grid=6), prompt([(3, "I", 6)], grid=6)
    plain = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    with dropflow.attach(model, policy(merge=MERGE | {"at": "output", "budget": 4, "order": "raster"})):
        output = model.get_image_features(inputs["pixel_values"])
    places = output.deepstack_features[-1][0][:, 0].nonzero()[:, 0]
    assert places.tolist() == [14, 17, 32, 35]
    means = plain.view(2, 3, 2, 3, -1).mean((1, 3)).flatten(0, 1)
    assert relative_error(output.pooler_output[0][places], means) < 1e-6

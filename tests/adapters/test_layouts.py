"""Newlines, tiles, frames and budgets: what becomes of tokens that are not simply one grid per sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import relative_error

import dropflow
from dropflow import PruneCall, Stage, hookimpl
from dropflow.backbone.image_layout import ImageLayout
from dropflow.errors import UnsupportedCall
from dropflow.testing import MaskedOracle, Tiny, tiny_models
from dropflow.testing.case import Case
from dropflow.testing.facts import truth
from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Picture, pixels
from dropflow.testing.probes import RAGGED, WINDOW, EveryThird, policy, use
from dropflow_adapters.llava import Llava

FAMILIES = tiny_models()
BUDGET = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
NEWLINES = ["llava_next", "llava_next_video", "llava_onevision"]


@pytest.mark.parametrize("which", [WINDOW, RAGGED], ids=["window", "ragged"])
@pytest.mark.parametrize("name", NEWLINES)
@torch.no_grad()
def test_a_newline_stays_exactly_as_long_as_a_patch_of_its_row(name: str, which: dict[str, Any]) -> None:
    family, tiny = FAMILIES[name]
    model = tiny.model()
    inputs, shown = tiny.prompt()
    with dropflow.attach(model, which) as flow:
        model(**inputs)
        live = flow.live()
    rows_seen = rows_gone = 0
    for sample, pictures in enumerate(shown):
        places = (inputs["input_ids"][sample] == IMAGE).nonzero()[:, 0]
        start = 0
        for layout in (layout for picture in pictures for layout in picture.layouts):
            own = live[:, sample, places[start : start + layout.tokens]]
            start += layout.tokens
            if layout.line_ends and layout.grid:
                rows = own.unflatten(1, (layout.grid[0], layout.grid[1] + 1))
                assert torch.equal(rows[..., -1], rows[..., :-1].any(-1))
                rows_seen += int(rows[..., -1].sum())
                rows_gone += int((~rows[..., -1] & own.any(1)[:, None]).sum())
    assert rows_seen > 0
    assert rows_gone > 0, "no row was dropped from an image of which others stayed, so nothing was proven"
    assert family(model).gridded


@torch.no_grad()
def test_the_newline_of_a_video_goes_with_its_last_token() -> None:
    class LastFrameGoes(Stage[Any]):
        prune_at = (2, 3)

        @hookimpl
        def prune(self, call: PruneCall) -> dropflow.Keep:
            last = call.image_id == len(call.image_sizes) - 1
            return dropflow.Keep(~last if call.boundary == 2 else torch.zeros_like(last))

    _, tiny = FAMILIES["llava_onevision"]
    model, inputs = tiny.model(), tiny.prompt([(3, "V", 5)])[0]
    with dropflow.attach(model, policy(a=use(LastFrameGoes))) as flow:
        model(**inputs)
        live = flow.live()[:, 0, 4:17]
    assert live[1].all()
    assert live[2].tolist() == [True] * 8 + [False] * 4 + [True]
    assert not live[3].any()


IMAGES, MIXED = ((3, "I", 5), (1, "I", 2, "I", 9), (4,)), ((3, "V", 5), (2, "I", 6))


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("qwen3_vl", IMAGES),
        ("qwen3_vl", MIXED),
        ("llava_onevision", IMAGES),
        ("llava_onevision", MIXED),
        ("gemma3", IMAGES),
        ("idefics3", IMAGES),
        ("paligemma", IMAGES),
        ("video_llava", MIXED),
        ("llava_next_video", MIXED),
    ],
)
@torch.no_grad()
def test_beams_see_the_images_of_their_own_sample(name: str, samples: Any) -> None:
    family, tiny = FAMILIES[name]
    model, inputs = tiny.model(), tiny.prompt(samples)[0]
    for which in (WINDOW, policy(encode=use(EveryThird))):
        with dropflow.attach(model, which) as flow:
            tokens = model.generate(**inputs, **(BUDGET | {"num_beams": 3}))
            live = flow.live()[:, ::3]
        with MaskedOracle(model, live, family):
            expected = model.generate(**inputs, **(BUDGET | {"num_beams": 3}), use_cache=False)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_next"])
@torch.no_grad()
def test_chunked_prefill_equals_the_masked_run(name: str) -> None:
    family, tiny = FAMILIES[name]
    model, inputs = tiny.model(), tiny.prompt([(3, "I", 12)])[0]
    chunk = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 3  # the image in the first chunk, text in the second
    with dropflow.attach(model, RAGGED) as flow:
        tokens = model.generate(**inputs, **BUDGET, prefill_chunk_size=chunk)
        live = flow.live()
    with MaskedOracle(model, live, family):
        expected = model.generate(**inputs, **BUDGET, use_cache=False)
    assert torch.equal(tokens, expected)


def pyramid(**options: Any) -> dict[str, Any]:
    return policy(pyramid={"use": "hidrop/concave-pyramid", **options})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": {2: 0.25}}, [[2], [3, 2]]),
        ({"keep": {2: 3}}, [[3], [3, 3]]),
        ({"keep": {2: 3}, "split": "per_image"}, [[3], [3, 3]]),
        ({"keep": {2: 0.25}, "split": "total"}, [[2], [3, 2]]),
        ({"keep": {2: 5}, "split": "total"}, [[5], [3, 2]]),
        ({"keep": {2: 7, 4: 1}, "split": "total"}, [[1], [1, 0]]),
        ({"keep": {2: 99}, "split": "total"}, [[8], [12, 8]]),
    ],
)
@torch.no_grad()
def test_budgets_are_split_among_images_by_the_stated_rule(options: Any, expected: list[list[int]]) -> None:
    _, tiny = FAMILIES["qwen2_vl"]
    family = FAMILIES["qwen2_vl"][0]
    case = Case("budgets", family, tiny, pyramid(**options), samples=((3, "I", 5), (1, "I", 2, "I", 9)))
    owner = truth(case).owner  # 8 tokens; 12 and 8 tokens
    with case.attach() as flow:
        case.model(**case.inputs)
        live = flow.live()[-1]
    kept = [[int((live[0] & (owner[0] == 0)).sum())], [int((live[1] & (owner[1] == g)).sum()) for g in (1, 2)]]
    assert kept == expected


@pytest.mark.parametrize(
    ("total", "sizes", "parts"),
    [(5, [12, 8], [3, 2]), (1, [8, 8], [1, 0]), (10, [3, 3, 3], [3, 3, 3]), (4, [3, 3, 3], [2, 1, 1]), (0, [4], [0])],
)
def test_a_total_is_divided_by_largest_remainder(total: int, sizes: list[int], parts: list[int]) -> None:
    from dropflow.operators import divide

    assert divide(total, sizes) == parts


def test_pixtral_images_keep_their_aspect_ratio() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    def build() -> Any:
        vision = {**VISION, "head_dim": 8, "image_size": 32, "patch_size": 4, "model_type": "pixtral"}
        config = LlavaConfig(
            text_config={**TEXT, "model_type": "mistral", "head_dim": 8},
            vision_config=vision,
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        return LlavaForConditionalGeneration(config)

    def picture(number: int, dice: torch.Generator) -> Picture:
        rows = 2 + number % 2
        arguments = {
            "pixel_values": torch.nn.functional.pad(pixels(dice, 1, 3, 4 * rows, 16), (0, 0, 0, 16 - 4 * rows)),
            "image_sizes": torch.tensor([[4 * rows, 16]]),
        }
        return Picture(([IMAGE] * 4 + [50]) * rows, arguments, [ImageLayout(4 * rows, (rows, 4))])

    from dropflow.testing import assert_backbone_conforms

    assert assert_backbone_conforms(Llava, Tiny(build, {"image": picture})) < 1e-5


@torch.no_grad()
def test_features_encoded_elsewhere_are_told_apart_too() -> None:
    _, tiny = FAMILIES["qwen2_vl"]
    model, inputs = tiny.model(), tiny.prompt(((3, "I", "I", 5),))[0]
    pixel = {name: inputs.pop(name) for name in ("pixel_values", "image_grid_thw")}
    features = model.model.get_image_features(**pixel, return_dict=True)
    position, _ = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], pixel["image_grid_thw"])
    given = {"position_ids": position, "mm_encoder_outputs": {"image": features}}
    with dropflow.attach(model, WINDOW) as flow:
        logits = model(**inputs, **given).logits
        live = flow.live()
        expected = model(**inputs, **pixel).logits
        assert torch.equal(flow.live(), live)
    assert relative_error(logits, expected) < 1e-6
    with (
        dropflow.attach(model, RAGGED),
        pytest.raises(UnsupportedCall, match="mm_encoder_outputs: encoded without the policy"),
    ):
        model(**inputs, **given)


@pytest.mark.parametrize(("name", "most"), [("llava_next", None), ("llava_onevision", 9), ("llava_onevision", 2)])
@torch.no_grad()
def test_grids_of_tiles_follow_the_models_own_packing_at_any_image_size(name: str, most: int | None) -> None:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    family, tiny = FAMILIES[name]
    model = tiny.model()
    config = model.config
    config.image_grid_pinpoints = [[24 * r, 24 * c] for r in range(1, 5) for c in range(1, 5)]
    more: dict[str, Any] = {"vision_feature_select_strategy": "default"}
    if most is not None:
        config.vision_aspect_ratio = f"anyres_max_{most}"
        more = {"vision_aspect_ratio": config.vision_aspect_ratio}
    dice = torch.Generator().manual_seed(0)
    grids = set()
    for _ in range(60):
        size = torch.randint(6, 120, (2,), generator=dice)
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, 24)
        features = torch.randn(tiles, 16, 32, generator=dice)
        # newlines are told from patches by their value
        packed, _ = model.model.pack_image_features(
            [features], size[None], image_newline=torch.full((32,), 77.0), **more
        )
        (layouts,) = family(model).layouts("image", [len(packed[0])], {"image_sizes": size[None]})
        assert sum(layout.tokens for layout in layouts) == len(packed[0])
        newline = torch.cat([layout.extra(packed[0].device) for layout in layouts])
        assert torch.equal(newline, (packed[0] == 77.0).all(1))
        grids.add(layouts[-1].grid)
    assert len(grids) > 15

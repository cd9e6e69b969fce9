"""Readers of towers in forms that the tiny models do not have, checked by the Jacobian and by whole maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import policy

import dropflow
from dropflow import Backbone, EncodeCall, ImageLayout, Stage, hookimpl
from dropflow.errors import PolicyError
from dropflow.policy.registry import ADAPTERS, load
from dropflow.testing import END, IMAGE, START, TEXT, VIDEO, VISION, Picture, Tiny, check_reader, pixels, tiny_models
from dropflow.testing.case import Case
from dropflow.testing.families import minicpmv4_6
from dropflow.testing.families.llava_next import anyres_image, small
from dropflow.testing.families.ovis2 import INDICATORS
from dropflow.testing.probes import use
from dropflow_adapters.llava_onevision import interpolation

LLAVA: type[Backbone] = load(ADAPTERS, "llava")
PIXTRAL = {**VISION, "head_dim": 8, "image_size": 32, "patch_size": 8, "model_type": "pixtral"}


def llava(**changes: Any) -> Any:
    """A builder of a LLaVA with these options of its config."""

    def build() -> Any:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        vision = CLIPVisionConfig(**VISION, image_size=24, patch_size=6)
        options = {"text_config": LlamaConfig(**TEXT), "vision_config": vision, "image_token_id": IMAGE}
        return LlavaForConditionalGeneration(LlavaConfig(**(options | changes)))

    return build


def ragged(number: int, dice: torch.Generator) -> Picture:
    """An image of 2 x 4 or 4 x 4 patches of a Pixtral tower, padded to one size."""
    rows = 2 + 2 * (number % 2)
    padded = torch.nn.functional.pad(pixels(dice, 1, 3, 8 * rows, 32), (0, 0, 0, 32 - 8 * rows))
    size = torch.tensor([[8 * rows, 32]])
    return Picture(
        [IMAGE] * 4 * rows, {"pixel_values": padded, "image_sizes": size}, [ImageLayout(4 * rows, (rows, 4))]
    )


def square(tokens: int) -> Any:
    """Makes images of that many tokens."""

    def make(_: int, dice: torch.Generator) -> Picture:
        ids = [START, *[IMAGE] * tokens, END]
        return Picture(ids, {"pixel_values": pixels(dice, 1, 3, 24, 24)}, [ImageLayout(tokens)])

    return make


def onevision(most: int, size: int = 24) -> Any:
    """A builder of a LLaVA-OneVision with tiles of `size` pixels that downscales images of more than `most` tiles."""

    def build() -> Any:
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        config = LlavaOnevisionConfig(**small("siglip_vision_model", "full"), video_token_id=97)
        config.vision_aspect_ratio = f"anyres_max_{most}"
        config.vision_config.image_size = size
        return LlavaOnevisionForConditionalGeneration(config)

    return build


def large(number: int, dice: torch.Generator) -> Picture:
    """An image on 2 x 2 tiles, downscaled from 8 x 8 or 8 x 6 to about 4 x 4 tokens."""
    height, width = ((48, 48), (48, 36))[number % 2]
    side = (8 * (width // 6) / 16) ** 0.5
    rows, columns = int(8 // side), int(width // 6 // side)
    layouts = [ImageLayout(16, (4, 4)), ImageLayout(rows * (columns + 1), (rows, columns), line_ends=True)]
    arguments = {"pixel_values": pixels(dice, 1, 5, 3, 24, 24), "image_sizes": torch.tensor([[height, width]])}
    return Picture([IMAGE] * sum(layout.tokens for layout in layouts), arguments, layouts)


def odd_frames(_: int, dice: torch.Generator) -> Picture:
    """Two frames of 5 x 5 patches, pooled to 3 x 3 tokens that lie between unlike shares of their neighbours."""
    layouts = [ImageLayout(9, (3, 3)), ImageLayout(10, (3, 3), tail=1, closes=True)]
    return Picture([VIDEO] * 19, {"pixel_values_videos": pixels(dice, 1, 2, 3, 30, 30)}, layouts)


def ovis2_blocks() -> Any:
    """An Ovis 2 that joins 2 x 2 of its 4 x 4 patches."""
    model = tiny_models()["ovis2"][1].build()
    model.config.vision_config.hidden_stride = 2
    return type(model)(model.config)


def block_tile(_: int, dice: torch.Generator) -> Picture:
    """A tile of 2 x 2 blocks."""
    ids = [INDICATORS[0], *[IMAGE] * 4, INDICATORS[1]]
    return Picture(ids, {"pixel_values": pixels(dice, 1, 3, 24, 24)}, [ImageLayout(4, (2, 2))])


def minicpm_fine() -> Any:
    """A MiniCPM-V 4.6 that leaves out the merger between two layers of its tower."""
    model = minicpmv4_6.tiny().build()
    model.config.downsample_mode = "4x"
    return model


def fine(number: int, dice: torch.Generator) -> Picture:
    """A picture of 4 x 8 or 8 x 6 tokens, each of 2 x 2 patches."""
    rows, columns = ((4, 8), (8, 6))[number % 2]
    arguments = {
        "pixel_values": pixels(dice, 4 * rows * columns, 3, minicpmv4_6.SIDE, minicpmv4_6.SIDE),
        "target_sizes": torch.tensor([[2 * rows, 2 * columns]], dtype=torch.int32),
    }
    ids = [START, *[IMAGE] * rows * columns, END]
    return Picture(ids, arguments, [ImageLayout(rows * columns, (rows, columns))])


FORMS: dict[str, tuple[str, Tiny]] = {
    "LLaVA with a Pixtral tower": (
        "llava",
        Tiny(
            llava(vision_config=PIXTRAL, vision_feature_layer=-1, vision_feature_select_strategy="full"),
            {"image": ragged},
        ),
    ),
    "features of two layers": ("llava", Tiny(llava(vision_feature_layer=[-3, -2]), {"image": square(16)})),
    "features of two layers with CLS": (
        "llava",
        Tiny(llava(vision_feature_layer=[1, -1], vision_feature_select_strategy="full"), {"image": square(17)}),
    ),
    "features of two layers in tiles": (
        "llava_next",
        Tiny(
            lambda: _llava_next(small("clip_vision_model", "default") | {"vision_feature_layer": [-3, -2]}),
            {"image": anyres_image},
        ),
    ),
    "blocks of patches as mixtures of words": (
        "ovis2",
        Tiny(ovis2_blocks, {"image": block_tile}, silent=(IMAGE, *INDICATORS)),
    ),
    "no merger inside the tower": (
        "minicpmv4_6",
        Tiny(minicpm_fine, {"image": fine}, minicpmv4_6.along_the_width, **minicpmv4_6.ROUND_OFF),
    ),
    "tiles that are downscaled": ("llava_onevision", Tiny(onevision(1), {"image": large})),
    "frames of an odd side": ("llava_onevision", Tiny(onevision(9, 30), {"image": odd_frames, "video": odd_frames})),
}


def _llava_next(options: dict[str, Any]) -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    return LlavaNextForConditionalGeneration(LlavaNextConfig(**options))


@pytest.mark.parametrize(("family", "tiny"), FORMS.values(), ids=FORMS)
def test_members_and_attention(family: str, tiny: Tiny) -> None:
    adapter = load(ADAPTERS, family)
    assert "vision_attention" in adapter(tiny.model()).facts()
    check_reader(Case(family, adapter, tiny, {}))


def test_what_joins_several_layers_can_be_read_but_not_cut() -> None:
    model = FORMS["features of two layers"][1].model()
    assert "vision_layers" not in LLAVA(model).facts()
    inside = policy(merge={"use": "mustdrop/spatial-merge", "at": 1})
    with pytest.raises(PolicyError, match=r"works inside the vision encoder, but this model joins the features of sev"):
        dropflow.attach(model, inside)
    deep = policy(keys={"use": "mustdrop/key-set", "layer": 3})
    with pytest.raises(PolicyError, match=r"stages\.keys: reads vision layer 3, expected 0 to 2; name a layer"):
        dropflow.attach(model, deep)


@torch.no_grad()
def test_onevision_images_of_a_sample_with_several_are_overviews() -> None:
    adapter, tiny = tiny_models()["llava_onevision"]
    reader = adapter(tiny.model()).reader()
    assert reader is not None
    first, second = reader.members([17, 17], {"image_sizes": torch.tensor([[24, 24], [24, 24]])})
    assert first[:, 0].tolist() == [*range(16), -1]
    assert second[:, 0].tolist() == [*range(16, 32), -1]


@pytest.mark.parametrize("sizes", [(27, 14), (5, 3), (8, 5), (4, 4)])
def test_onevision_tokens_are_interpolated_with_the_stated_weights(sizes: tuple[int, int]) -> None:
    own, new = sizes
    values = torch.randn(own, own, generator=torch.Generator().manual_seed(0))
    members, weights = interpolation(torch.arange(own**2).view(own, own), (new, new))
    found = (values.flatten()[members.clamp(min=0)] * weights).sum(2)
    pooled = torch.nn.functional.interpolate(values[None, None], size=(new, new), mode="bilinear")[0, 0]
    torch.testing.assert_close(found, pooled)
    torch.testing.assert_close(weights.sum(2), torch.ones(new, new))


@torch.no_grad()
def test_attention_is_pooled_as_the_features_of_a_video_are() -> None:
    """As LLaVA-OneVision pools the frames of a video (FlashVID and HoliTom pool the attention alike)."""
    adapter, tiny = tiny_models()["llava_onevision"][0], FORMS["frames of an odd side"][1]
    inputs, _ = tiny.prompt(((3, "V", 5),))

    class Reads(Stage[Any]):
        needs = frozenset({"vision_attention"})
        vision_taps = (-1,)

        @hookimpl
        def encode(self, call: EncodeCall) -> None:
            whole = call.tower(-1).received()
            side = adapter(model).side  # type: ignore[attr-defined]
            frames = whole.view(len(call.features), 1, side, side)
            size = (math.ceil(side / 2), math.ceil(side / 2))
            pooled = torch.nn.functional.interpolate(frames, size=size, mode="bilinear").flatten(1)
            torch.testing.assert_close(torch.stack(call.received_attention(-1)), pooled)
            seen.append(pooled)

    seen: list[torch.Tensor] = []
    model = tiny.model()
    with dropflow.attach(model, policy(read=use(Reads)), adapter=adapter):
        model(**inputs)
    assert len(seen) == 1


def test_layers_before_a_merger_cannot_be_read() -> None:
    adapter, tiny = tiny_models()["minicpmv4_6"]
    early = policy(keys={"use": "mustdrop/key-set", "layer": 0})
    with pytest.raises(
        PolicyError, match=r"stages\.keys: reads vision layer 0, expected 1 to 2; name a layer after the"
    ):
        dropflow.attach(tiny.model(), early, adapter=adapter)

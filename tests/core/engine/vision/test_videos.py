"""Videos: stages know which images are frames of which video, and may leave a frame empty or merge across frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

import dropflow
from dropflow import Encode, EncodeCall, Keep, PruneCall, Stage, hookimpl
from dropflow.backbone.image_layout import ImageLayout
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.testing import AbsentOracle, BrokenGuarantee, MaskedOracle, Tiny, assert_backbone_conforms, tiny_models
from dropflow.testing.families.qwen2_vl import packed
from dropflow.testing.families.tiny import END, IMAGE, START, VIDEO, Picture
from dropflow.testing.probes import Ranked, policy, use
from dropflow_adapters.llava_onevision import LlavaOnevision
from dropflow_adapters.qwen2_5_vl import Qwen25VL

FAMILIES = tiny_models()
BUDGET = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


class Sees(Stage[Any]):
    """Records the videos of every call."""

    reads_videos = True
    seen: ClassVar[list[Any]] = []

    @hookimpl
    def encode(self, call: EncodeCall) -> None:
        self.seen.append(call.videos)


class OddFramesGo(Stage[Any]):
    """Of every video, each second frame keeps no row."""

    reads_videos = True

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        keep = [torch.ones_like(places, dtype=torch.bool) for places in call.places]
        for frames in call.videos or ():
            for frame in frames[1::2]:
                keep[frame] = ~keep[frame]
        return Encode(keep=tuple(keep))


class FirstFrames(Stage[Any]):
    """The first frame of every video holds the mean over its frames, and the others hold nothing."""

    reads_videos = True

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        rows, places, shares = list(call.features), list(call.places), [torch.eye(len(p)) for p in call.places]
        sizes = list(call.sizes)
        for first, *others in call.videos or ():
            frames = [first, *others]
            rows[first] = torch.stack([call.features[frame] for frame in frames]).mean(0)
            sizes[first] = sizes[first] * len(frames)
            shares[first] = torch.eye(len(rows[first])).repeat(1, len(frames)) / len(frames)
            for frame in others:
                rows[frame], places[frame], sizes[frame] = rows[frame][:0], places[frame][:0], sizes[frame][:0]
                shares[frame] = shares[first][:0]
        return Encode(
            rows=tuple(rows),
            places=tuple(places),
            sizes=tuple(sizes),
            shares=lambda: tuple(shares),
            across_frames=True,
        )


def of_lengths(*lengths: int) -> Tiny:
    """Qwen2.5-VL whose n-th video has so many time steps of 2 x 3 tokens."""
    tiny = FAMILIES["qwen2_5_vl"][1]

    def video(number: int, dice: torch.Generator) -> Picture:
        times = lengths[number]
        ids = [START, *[VIDEO] * (6 * times), END]
        return Picture(ids, packed("video", times, 4, 6, dice), [ImageLayout(6, (2, 3))] * times)

    return replace(tiny, pictures={**tiny.pictures, "video": video})


def seen(name: str, samples: Sequence[Any], tiny: Tiny | None = None) -> list[Any]:
    """What `Sees` is told in one forward."""
    model = (tiny or FAMILIES[name][1]).model()
    Sees.seen = []
    with torch.no_grad(), dropflow.attach(model, policy(sees=use(Sees))):
        model(**(tiny or FAMILIES[name][1]).prompt(samples)[0])
    return Sees.seen


def test_a_stage_is_told_the_frames_of_every_video_in_order_and_pictures_are_none() -> None:
    beside = [(1, "I", 2, "V", 3), (2, "V", 1, "V")]
    told = seen("qwen2_5_vl", beside, of_lengths(0, 3, 1, 2))
    assert told == [(), ((0, 1, 2), (3,), (4, 5))]
    assert seen("llava_onevision", beside) == [(), ((0, 1, 2), (3, 4, 5), (6, 7, 8))]
    assert seen("video_llava", [(1, "V", 2), (2, "V")]) == [((0, 1), (2, 3))]
    assert seen("llava_next_video", [(1, "V", 2), (2, "V")]) == [((0, 1, 2), (3, 4, 5))]


@pytest.mark.parametrize("stage", [OddFramesGo, FirstFrames])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "qwen3_vl", "qwen3_5"])
@torch.no_grad()
def test_frames_without_tokens_and_rows_of_several_frames(name: str, stage: type[Stage[Any]]) -> None:
    family, tiny = FAMILIES[name]
    model, (inputs, shown) = tiny.model(), tiny.prompt([(3, "V", 5), (1, "I", 2, "V", 6)])
    given: list[torch.Tensor] = []
    with dropflow.attach(model, policy(stage=use(stage), rank=use(Ranked))) as flow:
        see = family(model).text.register_forward_pre_hook(
            lambda _, __, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True, prepend=True
        )
        tokens = model.generate(**inputs, **BUDGET)
        live, report = flow.live(), flow.report()
        see.remove()
    odd = stage is OddFramesGo
    for sample, pictures in enumerate(shown):
        frames = pictures[-1].layouts
        own = live[0, sample][inputs["input_ids"][sample] == VIDEO]
        for frame, (layout, part) in enumerate(
            zip(frames, own.split([layout.tokens for layout in frames]), strict=True)
        ):
            patches, newline = part[: layout.patches], part[layout.patches :]
            assert bool(patches.all() if frame == 0 or (odd and frame == 2) else ~patches.any())
            assert bool(newline.all()), "what ends a video stays with its first frame"
    assert report.entry_visual_tokens > 0
    whole = family(model).shape.attending is None
    oracle = (MaskedOracle if whole else AbsentOracle)(model, live, family, embeds=given[0], deepstack=None)
    if name == "qwen3_vl":
        return  # the kit compares deepstack
    with oracle:
        assert torch.equal(tokens, model.generate(**inputs, **BUDGET, use_cache=False))


@torch.no_grad()
def test_a_merged_row_holds_rows_of_all_frames_of_its_video() -> None:
    tiny = of_lengths(3, 1, 2)
    model, inputs = tiny.model(), tiny.prompt([(3, "V", 5), (1, "V", 2, "V", 6)])[0]
    pixels = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    plain = model.get_video_features(**pixels).pooler_output
    with dropflow.attach(model, policy(stage=use(FirstFrames))):
        merged = model.get_video_features(**pixels).pooler_output
    for before, after in zip(plain, merged, strict=True):
        assert torch.allclose(after[:6], before.view(-1, 6, before.shape[1]).mean(0), atol=1e-6)
        assert not after[6:].any()


@torch.no_grad()
def test_what_the_encoder_says_of_a_row_of_several_frames_is_the_mean_over_them() -> None:
    class Reads(Stage[Any]):
        vision_taps = (-1,)
        needs = frozenset({"vision_attention"})
        got: ClassVar[list[Any]] = []

        @hookimpl
        def encode(self, call: EncodeCall) -> None:
            self.got.append((call.received_attention(-1), call.unit_keys(-1)))

    for name, samples in (("qwen2_5_vl", [(3, "V", 5), (2, "V", 1)]), ("llava_onevision", [(3, "V", 5)])):
        tiny, Reads.got = FAMILIES[name][1], []
        model, inputs = tiny.model(), tiny.prompt(samples)[0]
        for stages in ({"reads": use(Reads)}, {"first": use(FirstFrames), "reads": use(Reads)}):
            with dropflow.attach(model, policy(**stages)):
                model(**inputs)
        for whole, merged in zip(*Reads.got, strict=True):
            frames = len(whole) // len(samples)
            assert frames > 1
            for video in range(len(samples)):
                first = video * frames
                expected = torch.stack(whole[first : first + frames]).mean(0)
                assert torch.allclose(merged[first], expected, atol=1e-6)
                assert [len(part) for part in merged[first + 1 : first + frames]] == [0] * (frames - 1)


class LastFrameGoes(Stage[Any]):
    """All frames but the last of every video stay, as stated."""

    reads_videos = True

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        keep = [torch.ones_like(places, dtype=torch.bool) for places in call.places]
        for frames in call.videos or ():
            keep[frames[-1]] = ~keep[frames[-1]]
        return Encode(keep=tuple(keep))


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "auto:internvl"])
@torch.no_grad()
def test_where_pictures_and_frames_come_alike_the_caller_states_them_or_is_refused(name: str) -> None:
    name, auto = name.removeprefix("auto:"), name.startswith("auto:")
    tiny = FAMILIES[name][1]
    model, inputs = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5)])[0]  # images 0, and 1 and 2
    with dropflow.attach(model, policy(stage=use(LastFrameGoes)), adapter="auto" if auto else None) as flow:
        for run in (lambda: model(**inputs), lambda: model.generate(**inputs, **BUDGET)):
            with pytest.raises(UnsupportedCall, match=r"stages\.stage: works on videos.* `with dropflow\.videos"):
                run()
        patches = int((inputs["input_ids"] == IMAGE).sum())
        for frames in ([], [[0], [1, 2]], [[2, 1, 0]]):
            with dropflow.videos(frames):
                model(**inputs)
                live = flow.live()[0, 0][inputs["input_ids"][0] == IMAGE]
                last = [own[-1] for own in frames]
                assert live.view(3, -1).all(1).tolist() == [image not in last for image in range(3)]
                assert int(live.sum()) == patches - patches // 3 * len(frames)
                tokens = model.generate(**inputs, **BUDGET)
                assert torch.equal(live, flow.live()[0, 0][inputs["input_ids"][0] == IMAGE])
            assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
        with dropflow.videos([[7]]), pytest.raises(UnsupportedCall, match=r"videos: frame 7 stated, but .* 3 images"):
            model(**inputs)
        model(input_ids=torch.tensor([[1, 5, 6]]))  # no image, nothing to state


def test_statements_that_cannot_be_meant_are_refused() -> None:
    for frames in ([[0, 1], []], [[0, 1], [1]], [[-1]]):
        refused = pytest.raises(ValueError, match=r"videos: expected one list of frames for each video")
        with refused, dropflow.videos(frames):
            pass


@torch.no_grad()
def test_a_caller_may_group_pictures_of_a_family_that_knows_no_videos() -> None:
    tiny = FAMILIES["llava"][1]
    model, inputs = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5), (2, "I", 1)])[0]
    Sees.seen = []
    with dropflow.attach(model, policy(stage=use(LastFrameGoes), sees=use(Sees))) as flow:
        model(**inputs)
        assert bool(flow.live()[0].equal(inputs["attention_mask"].bool()))
        with dropflow.videos([[0, 1]]):
            model(**inputs)
    assert Sees.seen == [(), ((0, 1),)]
    patches = (inputs["input_ids"] == IMAGE) & flow.live()[0]
    assert patches.sum(1).tolist() == [16, 16]


@torch.no_grad()
def test_prune_finds_an_empty_frame_as_an_image_without_patches() -> None:
    class Sizes(Stage[Any]):
        prune_at = (2,)
        sizes: ClassVar[list[Any]] = []

        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            self.sizes.append((call.image_sizes, call.counts(dropflow.Budget(share=0.5)).tolist()))
            return Keep(torch.ones_like(call.valid))

    tiny = of_lengths(2, 3)
    model, inputs = tiny.model(), tiny.prompt([(3, "V", 5), (1, "V", 2)])[0]
    with dropflow.attach(model, policy(stage=use(OddFramesGo), sizes=use(Sizes))):
        model(**inputs)
    assert Sizes.sizes == [((6, 0, 6, 0, 6), [3, 0, 3, 0, 3])]


@torch.no_grad()
def test_features_encoded_elsewhere_say_which_frames_are_which_or_are_refused() -> None:
    fold = policy(fold={"use": "holitom/folding", "at": 3, "keep": 0.5})
    for name, known in (("llava_next_video", True), ("video_llava", False)):
        tiny = FAMILIES[name][1]
        model, inputs = tiny.model(), tiny.prompt([(3, "V", 5)])[0]
        with dropflow.attach(model, fold) as flow:
            model(**inputs)
            expected = flow.live()
        pixels = {"pixel_values_videos": inputs.pop("pixel_values_videos")}
        pixels["vision_feature_layer"] = model.config.vision_feature_layer
        if known:
            pixels["vision_feature_select_strategy"] = "default"
        plain = {"video": model.model.get_video_features(**pixels)}
        with dropflow.attach(model, fold) as flow:
            if not known:
                with pytest.raises(
                    UnsupportedCall, match=r"mm_encoder_outputs: the video features do not say which fr"
                ):
                    model(**inputs, mm_encoder_outputs=plain)
            with dropflow.videos([[0, 1]] if not known else [[0, 1, 2]], modality="video"):
                model(**inputs, mm_encoder_outputs=plain)
            assert torch.equal(flow.live(), expected)


def test_an_adapter_that_states_wrong_lengths_is_found() -> None:
    class Short(Qwen25VL):
        def video_lengths(self, entries: Sequence[int], arguments: Any) -> Sequence[int]:  # noqa: ARG002
            return [1] * sum(entries)

    class Lost(LlavaOnevision):
        def video_lengths(self, entries: Sequence[int], arguments: Any) -> Sequence[int]:  # noqa: ARG002
            return [2] * len(entries)

    with pytest.raises(
        BrokenGuarantee, match=r"the fact 'videos' is wrong: the videos have the frames \[\(1, 2\), \(3, 4\)\], "
    ):
        assert_backbone_conforms(Short, FAMILIES["qwen2_5_vl"][1])
    tiny = FAMILIES["llava_onevision"][1]
    model, inputs = tiny.model(), tiny.prompt([(3, "V", 5)])[0]
    with (
        dropflow.attach(model, policy(stage=use(OddFramesGo)), adapter=Lost),
        pytest.raises(UnsupportedModel, match=r"Lost\.video_lengths: states videos of \[2\] frames, .* 3 images"),
    ):
        model(**inputs)

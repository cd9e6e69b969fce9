"""Units left out of a packed vision tower equal the full tower in which their keys are masked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from tiny import CHUNKS_IMAGES, policy, relative_error, tiny_llava
from torch import Tensor
from transformers import AttentionInterface

import dropflow
from dropflow import Encode, EncodeCall, EncodeEvent, Stage, hookimpl
from dropflow.errors import DecisionError, PolicyError, UnsupportedCall
from dropflow.testing import MaskedOracle, Tiny, tiny_models
from dropflow.testing.families.qwen2_vl import packed
from dropflow.testing.families.tiny import END, IMAGE, START, VIDEO, ImageLayout, Picture
from dropflow.testing.masked_tower import masked_features
from dropflow.testing.units import gone_rows, rows_of
from dropflow_lab.measure.flop_count import count_flops

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOWERS = (*FAMILIES, "qwen3_5")
"""Qwen3.5's text decoder has recurrent layers, which only the kit's absent oracle covers."""
BUDGET = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
GRIDS = ((4, 5), (3, 6))
"""Units of the pictures; windows of Qwen2.5-VL hold 2 x 2, those at the right edge fewer."""
Rule = Callable[[int, Tensor], Tensor]
"""From the number of an image and the places of its units, which of them stay."""


def deep(name: str) -> Tiny:
    """A family in miniature with a tower of four blocks, and larger pictures."""
    plain = tiny_models()[name][1]

    def build() -> Any:
        model = plain.build()
        vision = model.config.vision_config
        vision.depth = 4
        if name == "qwen2_5_vl":
            vision.fullatt_block_indexes = [1, 3]
        if name == "qwen3_vl":
            vision.deepstack_visual_indexes = [0, 2]
        return type(model)(model.config)

    def picture(number: int, dice: torch.Generator) -> Picture:
        rows, columns = GRIDS[number % 2]
        ids = [START, *[IMAGE] * (rows * columns), END]
        own = packed("image", 1, 2 * rows, 2 * columns, dice)
        return Picture(ids, own, [ImageLayout(rows * columns, (rows, columns))])

    def video(_: int, dice: torch.Generator) -> Picture:
        ids = [START, *[VIDEO] * 12, END] * 2 if name == "qwen3_vl" else [START, *[VIDEO] * 24, END]
        return Picture(ids, packed("video", 2, 6, 8, dice), [ImageLayout(12, (3, 4))] * 2)

    return replace(plain, build=build, pictures={"image": picture, "video": video})


def leaving_out(rule: Rule, *where: int | str) -> Any:
    """A stage that keeps units by a rule, at some places; it records its steps by modality in `seen`."""

    class LeavingOut(Stage[Any]):
        encode_at = where  # type: ignore[assignment]
        seen: ClassVar[dict[str, Any]] = {}

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            return Encode(keep=tuple(rule(image, places) for image, places in enumerate(call.places)))

        @hookimpl
        def observe_encode(self, event: EncodeEvent) -> None:
            self.seen[event.modality] = tuple(step for step in event.steps if step.boundary is not None)

    return LeavingOut


def half(image: int, places: Tensor) -> Tensor:
    """Half of the units, by hash."""
    return (places * 7 + image * 3) % 10 < 5


def without_a_picture(image: int, places: Tensor) -> Tensor:
    """All of the first picture, or time step, is gone."""
    return torch.full_like(places, bool(image), dtype=torch.bool)


def without_a_window(image: int, places: Tensor) -> Tensor:
    """The upper left window of 2 x 2 units is gone: of the first picture (5 columns) or time step (4)."""
    gone = torch.tensor([0, 1, 5, 6] if image == 0 else [])
    return ~torch.isin(places, gone)


def without_the_last(image: int, places: Tensor) -> Tensor:
    """The second picture or time step is gone, and a unit of the first."""
    return (places != 3) & (image == 0)


def all_of_it(_: int, places: Tensor) -> Tensor:
    return torch.ones_like(places, dtype=torch.bool)


def none_of_it(_: int, places: Tensor) -> Tensor:
    return torch.zeros_like(places, dtype=torch.bool)


RULES = (half, without_a_picture, without_a_window, without_the_last)


@contextmanager
def masked_tower(model: Any, seen: dict[str, Any], inputs: dict[str, Any]) -> Iterator[None]:
    """Lets the plain model's tower mask the units that a stage has left out, from the block on before which it did."""
    tower, forward = model.model.visual, model.model.visual.forward
    names = {"image": "pixel_values", "video": "pixel_values_videos"}
    gone = {len(inputs[names[modality]]): gone_rows(steps, 4) for modality, steps in seen.items()}

    def masked(pixels: Tensor, **more: Any) -> Any:
        attention = tower.config._attn_implementation
        return masked_features(lambda values: forward(values, **more), pixels, gone[len(pixels)], attention)

    tower.forward = masked
    try:
        yield
    finally:
        del tower.forward


@contextmanager
def rows_in_blocks(model: Any) -> Iterator[list[int]]:
    """Collects how many rows every block of the tower runs on."""
    seen: list[int] = []
    blocks = model.model.visual.blocks
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]))) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def modal(inputs: dict[str, Any], modality: str) -> dict[str, Any]:
    """Arguments of `get_<modality>_features`."""
    suffix = "_videos" if modality == "video" else ""
    return {name: inputs[name] for name in (f"pixel_values{suffix}", f"{modality}_grid_thw")}


WHERE = [("pixels",), (0,), (1,), (2,), ("pixels", 2)]
WAYS = [*((rule, "sdpa") for rule in RULES), (half, "eager")]


def way(where: tuple[Any, ...], rule: Rule, attention: str) -> Any:
    """A place and a rule; at all times, half of the units leave at every place, other rules and eager attention meet
    all that depends on the place: the tower's inputs, its later blocks, and a second time within it."""
    often = where == ("pixels", 2) or (rule is half and attention == "sdpa") or (where == (1,) and rule is not half)
    name = f"{where}-{rule.__name__}-{attention}"
    return pytest.param(where, rule, attention, marks=[] if often else [pytest.mark.slow], id=name)


@pytest.mark.parametrize(("where", "rule", "attention"), [way(where, *how) for where in WHERE for how in WAYS])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_features_of_the_units_that_stay_equal_the_masked_tower(
    name: str, where: tuple[Any, ...], rule: Rule, attention: str
) -> None:
    tiny = deep(name)
    model, (inputs, _) = tiny.model(attention), tiny.prompt([(3, "I", 2, "I", 2, "V", 5)])
    for modality in ("image", "video"):
        stage, given = leaving_out(rule, *where), modal(inputs, modality)
        method = getattr(model.model, f"get_{modality}_features")
        plain = method(**given)
        with dropflow.attach(model, policy(s={"use": stage})), rows_in_blocks(model) as rows:
            got = getattr(model.model, f"get_{modality}_features")(**given)
        kept = got.flags().kept
        assert 0 < kept.sum() < len(kept)
        first = 0 if where[0] == "pixels" else where[0]
        assert rows == [4 * len(kept)] * first + [4 * int(kept.sum())] * (4 - first)
        with masked_tower(model, stage.seen, inputs):
            expected = method(**given)
        for value, true, whole in zip(*(rows_of(one, kept) for one in (got, expected, plain)), strict=True):
            assert relative_error(value, true) < 1e-6
            assert torch.isfinite(whole).all()
        full = torch.cat(list(got.pooler_output))
        assert (full[~kept] == 0).all(), "rows of units that were left out are zeros"
        if rule is half and first == 0:  # it is another method than to encode everything and drop later
            assert relative_error(rows_of(got, kept)[0], rows_of(plain, kept)[0]) > 0.05


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_keeping_every_unit_is_the_model_itself(name: str) -> None:
    tiny = deep(name)
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5), (1, "I", 2, "V", 6), (4,)])
    plain, tokens = model(**inputs).logits, model.generate(**inputs, **BUDGET)
    with dropflow.attach(model, policy(s={"use": leaving_out(all_of_it, "pixels", 0, 2)})):
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, **BUDGET), tokens)
    assert torch.equal(model(**inputs).logits, plain)
    assert "forward" not in model.model.visual.__dict__


@pytest.mark.parametrize("where", [("pixels",), ("pixels", 2)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_with_a_prune_in_the_llm_prefill_and_decoding_equal_the_masked_run(name: str, where: tuple[Any, ...]) -> None:
    tiny, stage = deep(name), leaving_out(half, *where)
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5), (1, "I", 2, "V", 6), (4,)])
    which = policy(s={"use": stage}, random={"use": "control/random", "keep": {2: 0.5}})
    tower, calls = model.model.visual, []
    handle = tower.register_forward_pre_hook(lambda *_: calls.append(1))
    with dropflow.attach(model, which) as flow:
        logits, live = model(**inputs).logits, flow.live()
        calls.clear()
        tokens = model.generate(**inputs, **BUDGET)
        assert len(calls) == 2, "once for pictures and once for videos"
        assert torch.equal(flow.live(), live)
        if CHUNKS_IMAGES:
            chunked = model.generate(**inputs, **BUDGET, prefill_chunk_size=11)
            assert len(calls) == 4
            assert torch.equal(flow.live()[0], live[0]), "chunks rank otherwise in the LLM, but units are the same"
            assert chunked.shape == tokens.shape
    handle.remove()
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    assert 0 < (live[2] & visual).sum() < (live[0] & visual).sum() < visual.sum()
    with masked_tower(model, stage.seen, inputs), MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).logits
        assert torch.equal(tokens, model.generate(**inputs, **BUDGET, use_cache=False))
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_sample_of_a_ragged_batch_is_the_same_alone(name: str) -> None:
    tiny = deep(name)
    model, (inputs, shown) = tiny.model(), tiny.prompt([(3, "I", 5), (1, "I", 2, "V", 6)])
    which = policy(random={"use": "control/random", "encode": 0.5, "place": "pixels"})
    with dropflow.attach(model, which) as flow:
        together, live = model(**inputs).logits, flow.live()
        for sample, real in enumerate(inputs["attention_mask"].bool()):
            alone = tiny.collate([inputs["input_ids"][sample, real].tolist()], [shown[sample]], "left")
            logits = model(**alone).logits[0]
            assert torch.equal(flow.live()[:, 0], live[:, sample, real])
            assert relative_error(logits, together[sample, real]) < 1e-5


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_of_tower_and_llm_equal_the_masked_run(name: str, checkpointing: bool | None) -> None:
    tiny, stage = deep(name), leaving_out(half, "pixels", 2)
    model, (inputs, _) = tiny.model().train(), tiny.prompt([(3, "I", 5), (1, "I", 2, "V", 6)])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    inputs["labels"] = labels
    if checkpointing is not None:
        with warnings.catch_warnings():  # transformers 5.23 renames the call, 5.20 knows only this name
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    with dropflow.attach(model, policy(s={"use": stage}, random={"use": "control/random", "keep": {2: 0.5}})) as flow:
        loss, live = model(**inputs, use_cache=False).loss, flow.live()
        loss.backward()
    got = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    for module in model.modules():
        module.gradient_checkpointing = False
    with masked_tower(model, stage.seen, inputs), MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).loss
        expected.backward()
    assert relative_error(loss[None].detach(), expected[None].detach()) < 1e-5
    true = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert got.keys() == true.keys()
    for key, gradient in got.items():
        assert float((gradient - true[key]).abs().max()) < 1e-4 * max(float(true[key].abs().max()), 1e-3), key


@pytest.mark.parametrize("where", ["pixels", 1])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_whole_units_can_be_merged(name: str, where: Any) -> None:
    """Pairs of units become their mean, in the second one's place."""

    class Pairs(Stage[Any]):
        encode_at = (where,)
        seen: ClassVar[dict[str, Any]] = {}

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            rows = tuple(own.unflatten(0, (-1, 2)).mean(1) for own in call.features)
            return Encode(rows=rows, places=tuple(places[1::2] for places in call.places))

        @hookimpl
        def observe_encode(self, event: EncodeEvent) -> None:
            self.seen[event.modality] = event.steps

    tiny = deep(name)
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5)])
    given, visual = modal(inputs, "image"), model.model.visual
    with dropflow.attach(model, policy(s={"use": Pairs})):
        got = model.model.get_image_features(**given)
    kept = got.flags().kept

    def paired(rows: Tensor, order: Tensor) -> Tensor:
        """Rows in which the second unit of every pair, by `order` in the pixels, is the mean of both."""
        if rows.isnan().any():  # the oracle looks for rows of NaN, which no mean may spread
            return rows
        units = rows.view(len(rows) // 4, -1)[order.argsort()].clone()
        units[1::2] = units.unflatten(0, (-1, 2)).mean(1)
        return units[order].view(rows.shape)

    order = torch.arange(len(kept))
    if where == "pixels":
        given["pixel_values"] = paired(given["pixel_values"], order)
        handle = None
    else:
        if name == "qwen2_5_vl":
            from transformers.vision_utils import get_vision_window_index

            order, _ = get_vision_window_index(given["image_grid_thw"], 2, 16, 4)
        handle = visual.blocks[1].register_forward_pre_hook(lambda _, args: (paired(args[0], order), *args[1:]))
    with masked_tower(model, Pairs.seen, inputs):
        expected = model.model.get_image_features(**given)
    if handle is not None:
        handle.remove()
    assert kept.sum() == len(kept) // 2
    for number, (value, true) in enumerate(zip(rows_of(got, kept), rows_of(expected, kept), strict=True)):
        if where == 1 and number == 1:  # the deepstack tap before block 1 sees every unit as it was
            continue
        assert relative_error(value, true) < 1e-6


@pytest.mark.parametrize("where", ["pixels", 1])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_picture_of_which_nothing_is_left_is_not_there(name: str, where: Any) -> None:
    tiny = deep(name)
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5)])
    with dropflow.attach(model, policy(s={"use": leaving_out(none_of_it, where, 2)})) as flow:
        logits, live = model(**inputs).logits, flow.live()
        assert flow.report().entry_visual_tokens == 0
    with MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).logits
    words = live[0]
    assert (words.sum(), relative_error(logits[words], expected[words]) < 1e-5) == (1 + 3 + 2 + 5, True)


@torch.no_grad()
def test_the_stage_sees_pixels_by_unit_and_later_stages_see_what_is_left() -> None:
    tiny, calls = deep("qwen2_5_vl"), []
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5)])

    class Looking(Stage[Any]):
        encode_at = ("pixels", 1, None)

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode | None:
            calls.append(call)
            keep = tuple(places % 2 == 0 for places in call.places)
            protect = tuple(places[own] < 4 for places, own in zip(call.places, keep, strict=True))
            return Encode(keep=keep, protect=protect) if call.boundary == "pixels" else None

    drop = leaving_out(none_of_it, 2)
    with dropflow.attach(model, policy(look={"use": Looking}, drop={"use": drop})) as flow:
        model(**inputs)
        assert flow.report().entry_visual_tokens == 2 * 2, "the protected units stay"
    pixels, block, after = calls
    assert pixels.grids == block.grids == after.grids == GRIDS
    units = inputs["pixel_values"].view(38, -1).split([20, 18])
    assert all(torch.equal(own, true) for own, true in zip(pixels.features, units, strict=True))
    assert [len(own) for own in block.features] == [10, 9]
    assert block.features[0].shape[1] == 4 * 16
    assert [own.tolist() for own in after.places] == [[0, 2]] * 2
    assert (pixels.prefix, pixels.prefix_rows.shape[1], pixels.has_cls) == (0, 0, False)


@torch.no_grad()
def test_tables_that_the_caller_hands_over_are_cut_as_well() -> None:
    tiny, stage = deep("qwen2_5_vl"), leaving_out(half, "pixels")
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5)])
    given = modal(inputs, "image")
    with dropflow.attach(model, policy(s={"use": stage})) as flow:
        plain = model.model.get_image_features(**given)
        tower = flow._hooks.backbone.packed_tower
        tables = tower.tables({"grid_thw": given["image_grid_thw"]}).named
        own = model.model.get_image_features(**given, **{f"image_{name}": value for name, value in tables.items()})
        one = {"image_cu_seqlens": torch.tensor([0, 80, 152], dtype=torch.int32)}
        assert tables["cu_seqlens"].tolist() == [0, 80, 152]
        apart = model.model.get_image_features(**given, image_cu_seqlens=torch.tensor([0, 152], dtype=torch.int32))
        same = model.model.get_image_features(**given, **one)
    assert torch.equal(torch.cat(list(own.pooler_output)), torch.cat(list(plain.pooler_output)))
    assert torch.equal(torch.cat(list(same.pooler_output)), torch.cat(list(plain.pooler_output)))
    assert not torch.equal(torch.cat(list(apart.pooler_output)), torch.cat(list(plain.pooler_output)))


def by_borders(_: Any, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, None]:
    """A CPU stand-in for FlashAttention on packed rows: one call per block, with the borders of its segments."""
    borders = given["cu_seq_lens_q"]
    assert torch.equal(borders, given["cu_seq_lens_k"])
    assert borders[-1] == query.shape[2]
    assert 0 < borders.diff().min() <= borders.diff().max() <= given["max_length_q"]
    parts = [part.split(borders.diff().tolist(), dim=2) for part in (query, key, value)]
    attend = partial(torch.nn.functional.scaled_dot_product_attention, scale=given["scaling"])
    output = [attend(*own) for own in zip(*parts, strict=True)]
    return torch.cat(output, 2).transpose(1, 2), None


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_flash_attention_gets_the_borders_of_what_is_left(name: str) -> None:
    tiny = deep(name)
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5)])
    given, which = modal(inputs, "image"), policy(s={"use": leaving_out(half, "pixels", 2)})
    AttentionInterface.register("flash_by_borders", by_borders)
    try:
        with dropflow.attach(model, which):
            expected = torch.cat(list(model.model.get_image_features(**given).pooler_output))
            model.model.visual.config._attn_implementation = "flash_by_borders"
            got = torch.cat(list(model.model.get_image_features(**given).pooler_output))
    finally:
        AttentionInterface._global_mapping.pop("flash_by_borders")
    assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_the_same_units(dtype: torch.dtype) -> None:
    tiny, which = deep("qwen3_vl"), policy(s={"use": "control/stride", "encode": 0.5, "place": "pixels"})
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5)])
    live, logits = [], []
    for kind in (torch.float32, dtype):
        model.to(kind)
        with dropflow.attach(model, which) as flow:
            logits.append(model(**inputs).logits.float())
            live.append(flow.live())
    assert torch.equal(*live)
    assert relative_error(*logits) < 0.1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"use": leaving_out(half, 0.5)}, r"stages\.s: works at 0\.5 of the vision encoder, on rows inside units of 4"),
        ({"use": leaving_out(half, "features")}, r"works at 'features' .* with whole units: on 'pixels', before a"),
        ({"use": leaving_out(half, 4)}, r"stages\.s: works at boundary 4 of the vision encoder, expected 0 to 3"),
        ({"use": leaving_out(half, -1)}, r"stages\.s: works at boundary -1 of the vision encoder, expected 0 to 3"),
        ({"use": "tome/token-merging", "r": 2}, r"stages\.s: works at 0\.5 of the vision encoder, on rows inside"),
        (
            {"use": "mustdrop/spatial-merge", "at": 1},
            r"stages\.s\.at: merges rows inside units of 4 that this model joins; merge",
        ),
    ],
)
def test_places_inside_units_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dropflow.attach(deep("qwen2_vl").model(), policy(s=entry))


def test_reading_attention_of_a_tower_that_is_cut_is_refused() -> None:
    class Reads(Stage[Any]):
        vision_taps = (1,)

        @hookimpl
        def exit(self, call: Any) -> None: ...

    which = policy(s={"use": leaving_out(half, "pixels")}, r={"use": Reads})
    with pytest.raises(PolicyError, match=r"stages\.r: reads the attention of vision layer 1, but stages\.s leaves"):
        dropflow.attach(deep("qwen2_vl").model(), which)


def test_pixels_are_refused_on_other_towers() -> None:
    with pytest.raises(PolicyError, match=r"stages\.s: works on pixels, but this model's vision tower is not one"):
        dropflow.attach(tiny_llava(), policy(s={"use": "control/stride", "encode": 4, "place": "pixels"}))


@torch.no_grad()
def test_merged_units_cannot_be_weighed_and_wrong_grids_are_refused() -> None:
    class Weighs(Stage[Any]):
        encode_at = (1,)

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            return Encode(rows=call.features, places=call.places, proportional=True)

    tiny = deep("qwen2_vl")
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5)])
    plain = model(**inputs).logits
    with (
        dropflow.attach(model, policy(s={"use": Weighs})),
        pytest.raises(DecisionError, match=r"stages\.s: `encode` returned proportional=True, but the blocks of a pack"),
    ):
        model(**inputs)
    with (
        dropflow.attach(model, policy(s={"use": leaving_out(half, "pixels")})),
        pytest.raises(UnsupportedCall, match="hidden_states: 76 patches, but the grids of the pictures have 80"),
    ):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:-4]})
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("where", "through", "table"),
    [
        (("pixels",), 4 + 9, "vision tower: 6.5 visual tokens on average over its layers (dense 19)"),
        ((1,), (4 + 9) + (16 + 9) / 4, "vision tower: 9.625 visual tokens on average over its layers (dense 19)"),
        ((3,), (4 + 9) + (16 + 9) * 3 / 4, "vision tower: 15.875 visual tokens on average over its layers (dense 19)"),
        ((None,), 38, ""),
    ],
)
@torch.no_grad()
def test_the_report_tells_what_went_through_the_tower(where: Any, through: float, table: str) -> None:
    def few(image: int, places: Tensor) -> Tensor:
        return places < (9 if image else 4)

    tiny = deep("qwen3_vl")
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5), (4,)])
    which = policy(s={"use": leaving_out(few, *where)}, random={"use": "control/random", "keep": {2: 2}})
    with dropflow.attach(model, which) as flow:
        model.generate(**inputs, **BUDGET)
        report = flow.report()
    assert report.entry_visual_tokens == (4 + 9) / 2
    assert report.tower_visual_tokens == through / 2
    assert report.tower_visual_tokens_dense == 38 / 2
    assert (table in str(report)) if table else ("vision tower" not in str(report))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_tower_does_the_work_of_what_is_left(name: str) -> None:
    tiny = deep(name)
    model, (inputs, shown) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5)])
    alone = count_flops(lambda: model.model.get_image_features(**shown[0][1].arguments))
    with dropflow.attach(model, policy(s={"use": leaving_out(without_a_picture, "pixels")})):
        left = count_flops(lambda: model.model.get_image_features(**modal(inputs, "image")))
    whole = count_flops(lambda: model.model.get_image_features(**modal(inputs, "image")))
    assert alone == left < whole / 2


@pytest.mark.parametrize("where", ["pixels", 1, None])
@torch.no_grad()
def test_new_rows_at_places_that_do_not_exist_are_refused(where: Any) -> None:
    class Astray(Stage[Any]):
        encode_at = (where,)

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            return Encode(rows=call.features, places=tuple(places + 1 for places in call.places))

    tiny = deep("qwen2_vl")
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5)])
    message = r"stages\.s: `encode` returned 20 rows, .* taken from the payload's places"
    with dropflow.attach(model, policy(s={"use": Astray})), pytest.raises(DecisionError, match=message):
        model(**inputs)

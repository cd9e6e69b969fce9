"""PixelPrune: recorded choices, what a prediction promises, the tower that runs on what is left, and old faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from goldens_2026 import DATA, golden
from hypothesis import given
from hypothesis import strategies as st
from llm_goldens import stage_of
from method_goldens import FEW
from syncs import HostSyncs
from tiny import policy, relative_error, tiny_llava
from torch import Tensor

import dropflow
from dropflow import EncodeCall, EncodeEvent, Stage, hookimpl
from dropflow.errors import DecisionError, PolicyError
from dropflow.policy.plan import resolve
from dropflow.testing import Tiny, tiny_models
from dropflow.testing.case import Case
from dropflow.testing.families.qwen2_vl import packed
from dropflow.testing.families.tiny import END, IMAGE, START, VIDEO, ImageLayout, Picture
from dropflow.testing.units import masked, rows_of
from dropflow.units import BackboneShape
from dropflow_lab.measure.flop_count import count_flops
from dropflow_pixelprune import Components, Predict
from dropflow_pixelprune.prediction import alike, kept

STAGE = "pixelprune/predict"
ORDERS = {
    "raster": {"order": "raster"},
    "serpentine": {"order": "serpentine"},
    "pred_2d_anchored": {"order": "pred_2d"},
    "pred_2d_sliding": {"order": "pred_2d", "anchored": False},
}
SCANS = sorted(path.stem for path in DATA.glob("pixel_*.npz") if "keep_raster" in golden(path.stem))
INK, PAPER = 0.25, -1.5
STAMPED = ("qwen3_vl", "qwen3_5")
"""Families whose videos have text between time steps."""


def pixel_call(units: Tensor, *grids: tuple[int, int]) -> EncodeCall:
    """A payload of pictures whose units are given one after the other."""
    own = units.split([rows * columns for rows, columns in grids])
    places = tuple(torch.arange(len(one)) for one in own)

    def nothing(_: int) -> Any:
        raise AssertionError("the tower has not run")

    none, ones = units.new_zeros(len(own), 0, units.shape[1]), tuple(torch.ones(len(one)) for one in own)
    return EncodeCall("pixels", tuple(own), none, places, ones, grids, 0, False, nothing, nothing)


def units_of(recorded: dict[str, Any]) -> Tensor:
    rows = recorded["patches"]
    return rows.reshape(len(rows) // 4, -1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", SCANS)
def test_recorded_choices(case: str, order: str) -> None:
    recorded = golden(case)
    meta, units = recorded["meta"], units_of(recorded)
    stage = stage_of(Predict, metric=meta["metric"], threshold=meta["threshold"], std=1.0, **ORDERS[order])
    grids = [tuple(own) for own in meta["units"]]
    answer = stage.encode(pixel_call(units, *grids))
    found = torch.cat([keep.nonzero()[:, 0] for keep in answer.keep])
    assert torch.equal(found, recorded[f"keep_{order}"])
    assert [int(keep.sum()) for keep in answer.keep] == recorded[f"counts_{order}"].tolist()


@pytest.mark.parametrize("case", ["pixel_conncomp", "pixel_conncomp_one_component"])
def test_recorded_components(case: str) -> None:
    recorded = golden(case)
    meta, units = recorded["meta"], units_of(recorded)
    for skip in meta["skip"]:
        answer = stage_of(Components, skip=skip).encode(pixel_call(units, tuple(meta["units"])))
        assert torch.equal(answer.keep[0].nonzero()[:, 0], recorded[f"keep_skip_{skip}"])


def test_recorded_rows_of_a_processor() -> None:
    """Two frames of 16 x 16 pixels and three channels in every patch."""
    recorded = golden("pixel_qwen3_exact")
    units = recorded["pixel_values"].reshape(48, -1)
    for options in ({}, {"threshold": 1e-4, "std": 0.5}, {"threshold": 1e-4, "std": [0.5, 0.5, 0.5]}):
        stage = stage_of(Predict, **options)
        stage._patches = 4
        (keep,) = stage.encode(pixel_call(units, tuple(recorded["meta"]["units"]))).keep
        assert torch.equal(keep.nonzero()[:, 0], recorded["out_unit"])
    rows = torch.arange(192).view(48, 4)[recorded["out_unit"]].flatten()
    assert torch.equal(rows, recorded["out_patch"])


def test_what_counts_as_a_difference() -> None:
    own, other = torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.3, -0.1, 0.0, 0.0]])
    sizes = {"max": 0.3, "mae": 0.1, "rmse": (0.1 / 4) ** 0.5}
    for metric, size in sizes.items():
        found = [bool(alike(metric, size * factor)(own, other)) for factor in (0.999, 1.001)]
        assert found == [False, True]
        assert [bool(alike(metric, 0.0)(own, one)) for one in (own, other)] == [True, False]


def drawn(seed: int, rows: int, columns: int, colours: int = 3) -> Tensor:
    """Units of a few colours in blocks, slightly uneven."""
    dice = torch.Generator().manual_seed(seed)
    coarse = torch.randint(colours, (rows // 2 + 1, columns // 3 + 1), generator=dice)
    plan = coarse.repeat_interleave(2, 0).repeat_interleave(3, 1)[:rows, :columns].flatten()
    return plan[:, None] * 0.2 + 0.02 * torch.rand(rows * columns, 6, generator=dice)


def replayed(units: Tensor, keep: Tensor, grid: tuple[int, int], threshold: float) -> Tensor:
    """The picture that someone with the units that stay can restore, by the rule of the paper, unit by unit."""
    (rows, columns), same, found = grid, alike("max", threshold), torch.zeros_like(units)
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        left, above, corner = place - 1, place - columns, place - columns - 1
        if keep[place]:
            found[place] = units[place]
        elif row == 0:
            found[place] = found[left]
        elif column == 0:
            found[place] = found[above]
        else:
            edge = same(found[corner], found[left]) and not same(found[corner], found[above])
            found[place] = found[above if edge else left]
    return found


@FEW
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 8), st.sampled_from([0.0, 0.012, 0.05, 0.3]))
def test_the_picture_can_be_restored_from_what_stays(seed: int, rows: int, columns: int, threshold: float) -> None:
    units = drawn(seed, rows, columns) if threshold else drawn(seed, rows, columns).round(decimals=1)
    keep = kept(units, (rows, columns), "max", threshold, "pred_2d")
    assert bool(keep[0])
    error = (replayed(units, keep, (rows, columns), threshold) - units).abs().max()
    assert float(error) <= threshold


@FEW
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0.0, 0.012]))
def test_one_row_is_the_same_in_either_scan(seed: int, columns: int, threshold: float) -> None:
    units = drawn(seed, 1, columns)
    scans = [kept(units, (1, columns), "mae", threshold, order) for order in ("raster", "serpentine", "pred_2d")]
    assert torch.equal(scans[0], scans[1])
    assert torch.equal(scans[0], scans[2])


def test_the_end_of_a_row_predicts_the_next_one_in_a_scan_alone() -> None:
    units = torch.tensor([1.0, 2, 2, 1])[:, None]
    assert kept(units, (2, 2), "max", 0.0, "raster").tolist() == [True, True, False, True]
    assert kept(units, (2, 2), "max", 0.0, "pred_2d").tolist() == [True, True, True, True]


def test_a_slow_gradient_vanishes_without_anchors_alone() -> None:
    units = torch.linspace(0, 1, 64)[:, None]
    for order in ("raster", "serpentine", "pred_2d"):
        counts = [int(kept(units, (1, 64), "max", 0.02, order, anchored=anchored).sum()) for anchored in (True, False)]
        assert counts == [64 // 2, 1]


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_the_host_never_waits_for_a_prediction(threshold: float) -> None:
    units = drawn(1, 5, 6)
    with HostSyncs() as syncs:
        for options in ORDERS.values():
            kept(units, (5, 6), "max", threshold, **options)
    assert syncs.places == []


def test_components_that_touch_at_corners_alone_are_two() -> None:
    units = torch.tensor([1.0, 2, 2, 1])[:, None]
    keep = stage_of(Components, skip=1.0).encode(pixel_call(units, (2, 2))).keep[0]
    assert keep.tolist() == [True] * 4


def drawing(columns: int, rows: int, inside: Any) -> Tensor:
    """Units in which `inside(row, column)` is ink on paper."""
    plan = torch.tensor([[inside(row, column) for column in range(columns)] for row in range(rows)])
    return torch.where(plan.flatten(), INK, PAPER)[:, None].expand(-1, 4 * 96).reshape(-1, 96)


def a_page(number: int, dice: torch.Generator) -> Picture:
    """A picture of 4 x 5 or 3 x 6 units with a rectangle on even ground, and a unit of noise."""
    rows, columns = ((4, 5), (3, 6))[number % 2]
    own = packed("image", 1, 2 * rows, 2 * columns, dice)
    noise = own["pixel_values"][-4:].clone()
    own["pixel_values"] = drawing(columns, rows, lambda row, column: row < 2 and 1 <= column < 4).contiguous()
    own["pixel_values"][-4:] = noise
    return Picture([START, *[IMAGE] * (rows * columns), END], own, [ImageLayout(rows * columns, (rows, columns))])


def a_film(name: str) -> Any:
    """Two time steps of 3 x 4 units: a blank one, and one whose frames differ in a single unit."""

    def make(_: int, dice: torch.Generator) -> Picture:
        ids = [START, *[VIDEO] * 12, END] * 2 if name in STAMPED else [START, *[VIDEO] * 24, END]
        own = packed("video", 2, 6, 8, dice)
        own["pixel_values_videos"] = torch.full_like(own["pixel_values_videos"], PAPER)
        second = own["pixel_values_videos"].view(2, 12, 4, 3, 2, 16)[1]
        second[5, :, :, 1] = INK  # the second frame of unit 5
        return Picture(ids, own, [ImageLayout(12, (3, 4))] * 2)

    return make


def paged(name: str) -> Tiny:
    tiny = tiny_models()[name][1]
    return replace(tiny, pictures={"image": a_page, "video": a_film(name)})


class Watch(Stage[Any]):
    """Records what became of the units."""

    seen: Any = ()

    @hookimpl
    def observe_encode(self, event: EncodeEvent) -> None:
        type(self).seen = event.steps


PAGES = ([0, 1, 4, 11, 19], [0, 1, 4, 13, 17])
"""Units that stay of the two pages."""
FILM = {"pred_2d": [0, 5, 6, 9], "serpentine": [0, 4, 5], "raster": [0, 5, 6]}
"""Units that stay of the second time step."""
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_tower_on_what_is_left_equals_the_tower_with_the_rest_masked(name: str, attention: str) -> None:
    adapter, tiny = tiny_models()[name][0], paged(name)
    which = policy(prune={"use": STAGE}, watch={"use": Watch})
    case = Case(name, adapter, tiny, which, attention, samples=[(3, "I", 2, "I", 5)])
    given = {key: case.inputs[key] for key in ("pixel_values", "image_grid_thw")}
    with case.attach():
        got = case.model.model.get_image_features(**given)
    flags = got.flags().kept
    assert [own.nonzero()[:, 0].tolist() for own in flags.split([20, 18])] == list(PAGES)
    expected = masked(case, "get_image_features", given, "pixel_values", Watch.seen)
    for value, true in zip(rows_of(got, flags), rows_of(expected, flags), strict=True):
        assert relative_error(value, true) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_time_step_and_every_picture_of_a_batch_is_predicted_by_itself(name: str) -> None:
    """The released code fails for a video, or drops the second time step whole, and fails for two prompts."""
    tiny = paged(name)
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "V", 5), (1, "I", 2), (4, "I", "I")])
    for order, second in FILM.items():
        with dropflow.attach(model, policy(prune={"use": STAGE, "order": order})) as flow:
            model(**inputs)
            live = flow.live()[0]
        film = live[0][inputs["input_ids"][0] == VIDEO].split(12)
        assert [own.nonzero()[:, 0].tolist() for own in film] == [[0], second], "a change in the second frame is seen"
        if order == "pred_2d":
            pages = [live[sample][inputs["input_ids"][sample] == IMAGE] for sample in (1, 2)]
            found = [own.nonzero()[:, 0].tolist() for own in (pages[0], *pages[1].split([20, 18]))]
            assert found == [PAGES[1], PAGES[0], PAGES[1]]


@torch.no_grad()
def test_the_tower_saves_the_work_of_what_is_left_out_and_the_report_says_so() -> None:
    tiny = paged("qwen3_vl")
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5)])
    given = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    whole = count_flops(lambda: model.model.get_image_features(**given))
    with dropflow.attach(model, policy(prune={"use": STAGE})) as flow:
        left = count_flops(lambda: model.model.get_image_features(**given))
        model(**inputs)
        report = flow.report()
    assert (report.tower_visual_tokens, report.tower_visual_tokens_dense) == (10, 38)
    assert "vision tower: 10 visual tokens on average over its layers (dense 38)" in str(report)
    assert left < whole * 10 / 38, "what grows with the tokens falls with them, and attention falls faster"


@torch.no_grad()
def test_a_picture_in_which_all_units_differ_is_left_as_it_is() -> None:
    _, tiny = tiny_models()["qwen2_5_vl"]
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2, "I", 5)])
    plain = model(**inputs).logits
    with dropflow.attach(model, policy(prune={"use": STAGE})):
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_positions_are_those_of_the_uncut_prompt() -> None:
    """A recorded run of the released code with a tiny Qwen3-VL."""
    recorded = golden("pixel_e2e_one")
    tiny = tiny_models()["qwen3_vl"][1]
    model, names = tiny.model(), {90: IMAGE, 91: START, 92: END}
    ids = torch.tensor([[names.get(token, token) for token in recorded["input_ids"][0].tolist()]])

    def ink(row: int, column: int) -> bool:
        return column >= 2 if row < 2 else column == 4

    pixels = drawing(5, 4, ink)
    inputs = tiny.finish({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    inputs |= {"pixel_values": pixels, "image_grid_thw": recorded["grid_thw"]}
    with dropflow.attach(model, "pixelprune-documents") as flow:
        model(**inputs)
        live = flow.live()[0, 0]
    image = ids[0] == IMAGE
    assert torch.equal(live[image].nonzero()[:, 0], recorded["out_unit"])
    assert torch.equal(image[live], recorded["out_visual_mask"][0])
    types = inputs["mm_token_type_ids"]
    positions, deltas = model.model.get_rope_index(ids, image_grid_thw=recorded["grid_thw"], mm_token_type_ids=types)
    assert torch.equal(positions[-3:, :, live], recorded["out_position_ids"])
    assert model.model.rope_deltas.tolist() == deltas.tolist() == recorded["meta"]["rope_delta"]


@torch.no_grad()
def test_a_threshold_counts_in_pixels_as_they_were_before_the_processor() -> None:
    """With the standard deviations of CLIP, which Qwen2.5-VL's processor divides by."""
    std = [0.26862954, 0.26130258, 0.27577711]
    tiny = tiny_models()["qwen2_5_vl"][1]
    model = tiny.model()
    raw = torch.full((8, 4, 3, 32), 0.5)
    raw[3, 1, 2] += 0.04
    raw[5, 0, 0] -= 0.06
    values = ((raw - 0.45) / torch.tensor(std)[:, None]).reshape(32, 96)
    ids = torch.tensor([[1, START, *[IMAGE] * 8, END, 5]])
    inputs = tiny.finish({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    inputs |= {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 2, 16]])}
    for threshold, left in ((0.03, [0, 3, 4, 5, 6]), (0.05, [0, 5, 6]), (0.07, [0])):
        which = policy(prune={"use": STAGE, "threshold": threshold, "std": std})
        with dropflow.attach(model, which) as flow:
            model(**inputs)
            assert flow.live()[0, 0, 2:10].nonzero()[:, 0].tolist() == left


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(
        PolicyError, match=r"stages\.prune: a `threshold` above 0 is in units of pixels .* state the `std`"
    ):
        dropflow.load_policy(policy(prune={"use": STAGE, "threshold": 0.02}))
    with pytest.raises(PolicyError, match=r"stages\.prune: needs units, which the adapter Llava cannot give"):
        dropflow.attach(tiny_llava(), policy(prune={"use": STAGE}))
    tiny = paged("qwen3_vl")
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 2)])
    first = {"use": "control/stride", "encode": 0.5, "place": "pixels"}
    message = r"stages\.prune: works on whole pictures, got 10 units of a picture of 4 x 5 units; put it before other"
    with dropflow.attach(model, policy(first=first, prune={"use": STAGE})), pytest.raises(DecisionError, match=message):
        model(**inputs)


def test_the_published_setting_loses_no_pixel() -> None:
    published = dropflow.load_policy("pixelprune-documents")
    options = published.stages["predict"].options.model_dump()
    assert options == {"metric": "max", "threshold": 0.0, "std": None, "order": "pred_2d", "anchored": True}
    found = resolve(published, BackboneShape(36, 1024)).schedule()
    assert (found.tower, found.entry) == (None, None), "the picture decides"

"""The controls: random subsets that depend on seed, boundary and image alone, and keeping everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE, MIXED, Parts, policy, prompt, relative_error, tiny_llava

import dropflow
from dropflow import Encode, EncodeCall, Stage, hookimpl
from dropflow.errors import DecisionError, PolicyError
from dropflow.policy.plan import resolve
from dropflow.testing import MaskedOracle, tiny_models
from dropflow.units import BackboneShape
from dropflow_control.draw import draw, fingerprint
from dropflow_control.spacing import evenly, spread
from dropflow_control.windows import pool

LAYERS = policy(random={"use": "control/random", "keep": {2: 7, 4: 2}})
ENCODER = policy(random={"use": "control/random", "encode": 6})
BOTH = [LAYERS, ENCODER]


class Protect(Stage[Any]):
    """Protects the first three patches."""

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        return Encode(protect=tuple(torch.arange(len(f)) < 3 for f in call.features))


def alone(inputs: dict[str, Any], sample: int, image: int, images: int) -> dict[str, Any]:
    """One sample of a batch without its padding, with its own images."""
    real = inputs["attention_mask"][sample].bool()
    ids = inputs["input_ids"][sample, real][None]
    own = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return own | ({"pixel_values": inputs["pixel_values"][image : image + images]} if images else {})


def kept(model: Any, which: dict[str, Any], inputs: dict[str, Any]) -> torch.Tensor:
    """Which tokens were live (layers, batch, tokens)."""
    with dropflow.attach(model, which) as flow:
        model(**inputs)
        return flow.live()


@pytest.mark.parametrize("which", BOTH, ids=["layers", "encoder"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_sample_keeps_the_same_alone_and_in_a_batch(llava: Any, which: dict[str, Any], side: str) -> None:
    inputs = prompt(side=side)
    together = kept(llava, which, inputs)
    for sample, (image, images) in enumerate([(0, 1), (1, 2)]):
        real = inputs["attention_mask"][sample].bool()
        own = kept(llava, which, alone(inputs, sample, image, images))
        assert torch.equal(together[:, sample, real], own[:, 0])


@torch.no_grad()
def test_neighbours_in_another_order_change_nothing(llava: Any) -> None:
    samples: list[Parts] = [(3, "I", 5), (3, "I", 5), (3, "I", 5)]
    inputs = prompt(samples)
    turned = {key: value.flip(0) for key, value in inputs.items()}
    for which in BOTH:
        assert torch.equal(kept(llava, which, inputs), kept(llava, which, turned).flip(1))


@pytest.mark.parametrize("which", BOTH, ids=["layers", "encoder"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_a_pruned_run_equals_the_masked_run(which: dict[str, Any], tower: str) -> None:
    model, inputs = tiny_llava(tower=tower), prompt()
    with dropflow.attach(model, which) as flow:
        logits = model(**inputs).logits
        live = flow.live()
    with MaskedOracle(model, live):
        expected = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5


@torch.no_grad()
def test_every_image_keeps_its_number_at_every_boundary(llava: Any) -> None:
    inputs = prompt()
    visual = inputs["input_ids"] == IMAGE
    counts = [(live & visual).sum(1).tolist() for live in kept(llava, LAYERS, inputs)]
    assert counts == [[16, 32, 0]] * 2 + [[7, 14, 0]] * 2 + [[2, 4, 0]] * 2
    first = kept(llava, LAYERS, inputs)[2, 1, visual[1]]
    assert (first[:16].sum(), first[16:].sum()) == (7, 7)
    with dropflow.attach(llava, ENCODER) as flow:
        llava(**inputs)
        assert flow.report().entry_visual_tokens == pytest.approx((6 + 12) / 3)
        assert (flow.live() & visual).sum(2).tolist() == [[6, 12, 0]] * 6


@pytest.mark.parametrize("which", BOTH, ids=["layers", "encoder"])
@torch.no_grad()
def test_images_and_seeds_keep_different_tokens_and_runs_the_same(llava: Any, which: dict[str, Any]) -> None:
    inputs = prompt([(3, "I", 5)] * 4)
    visual = inputs["input_ids"][0] == IMAGE
    first, again = (kept(llava, which, inputs)[2, :, visual] for _ in range(2))
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) == 4
    options = which["stages"]["random"] | {"seed": 1}
    other = kept(llava, policy(random=options), inputs)[2, :, visual]
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@torch.no_grad()
def test_a_question_does_not_change_what_is_kept_of_the_image_in_front_of_it(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    asked = inputs | {"input_ids": inputs["input_ids"].clone()}
    asked["input_ids"][0, 20:] += 1
    assert torch.equal(kept(llava, LAYERS, inputs), kept(llava, LAYERS, asked))


def test_every_token_is_kept_equally_often() -> None:
    images = torch.randn(3000, 16, 8, generator=torch.Generator().manual_seed(0))
    times = torch.zeros(16)
    for features in images:
        times[draw(0, 2, features).topk(4).indices] += 1
    # 750 of 3000 each, by a standard deviation of 24
    assert times.sum() == 12000
    assert (times - 750).abs().max() < 4 * 24


def test_the_fingerprint_forgets_the_last_bits_and_the_scale_but_not_the_content() -> None:
    features = torch.randn(144, 128, generator=torch.Generator().manual_seed(0))
    noise = 1e-5 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    assert fingerprint(features + noise) == fingerprint(3 * features) == fingerprint(features)
    assert fingerprint(features.roll(1, 0)) != fingerprint(features)
    assert torch.equal(draw(0, 1, features + noise), draw(0, 1, features))
    for seed, boundary in ((1, 1), (0, 2), (0, None)):
        assert not torch.equal(draw(seed, boundary, features), draw(0, 1, features))
    assert fingerprint(features[:0]) == ()


def test_forecast_and_protected_tokens(llava: Any) -> None:
    plan = resolve(dropflow.load_policy(LAYERS), BackboneShape(6, 16))
    assert plan.schedule().per_layer == (16, 16, 7, 7, 2, 2)
    assert resolve(dropflow.load_policy(ENCODER), BackboneShape(6, 16)).schedule().per_layer == (6,) * 6

    with torch.no_grad():
        live = kept(llava, policy(protect={"use": Protect}, **LAYERS["stages"]), prompt([("I", 5)]))
    visual = live[:, 0, 1:17]
    assert visual.sum(1).tolist() == [16, 16, 7, 7, 3, 3]
    assert visual[:, :3].all()


@torch.no_grad()
def test_keep_all_is_the_model_itself(llava: Any) -> None:
    inputs = prompt(MIXED)
    plain = llava(**inputs).logits
    with dropflow.attach(llava, policy(keep={"use": "control/keep-all"})) as flow:
        assert torch.equal(llava(**inputs).logits, plain)
        assert [layer.visual_tokens for layer in flow.report().layers] == [16] * 6
        assert flow.plan.schedule().per_layer == (16,) * 6
        assert tuple(flow.plan.prune_at) == tuple(range(6))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_a_stride_is_exact_and_even(rows: int, columns: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, rows * columns))
    mask = spread(count, (rows, columns)).view(rows, columns)
    assert mask.sum() == count
    used = mask.sum(1)[mask.any(1)]
    assert not len(used) or used.max() - used.min() <= 1, "every row that is used has as many, give or take one"
    line = evenly(torch.arange(rows * columns), count, rows * columns).nonzero()[:, 0]
    assert len(line) == count
    gaps = line.diff()
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_a_quarter_of_a_grid_is_every_second_patch_of_every_second_row() -> None:
    mask = spread(144, (24, 24)).view(24, 24)
    assert mask.any(1).nonzero()[:, 0].diff().unique().tolist() == [2]
    assert mask.any(0).nonzero()[:, 0].diff().unique().tolist() == [2]
    assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None])


@torch.no_grad()
def test_a_stride_keeps_its_number_in_front_of_the_llm_and_inside(llava: Any) -> None:
    inputs = prompt()
    visual = inputs["input_ids"] == IMAGE
    live = kept(llava, policy(stride={"use": "control/stride", "keep": {2: 7, 4: 2}}), inputs)
    assert [(own & visual).sum(1).tolist() for own in live] == [[16, 32, 0]] * 2 + [[7, 14, 0]] * 2 + [[2, 4, 0]] * 2
    first = live[2, 1, visual[1]].view(2, 16)
    assert torch.equal(first[0], first[1])
    assert first[0].tolist() == evenly(torch.arange(16), 7, 16).tolist()
    live = kept(llava, policy(stride={"use": "control/stride", "encode": 4}), inputs)
    assert live[0, 0, visual[0]].tolist() == spread(4, (4, 4)).tolist()
    assert live[:, 1, visual[1]].sum(1).tolist() == [8] * 6


def test_a_stride_counts_protected_tokens_and_spreads_over_the_others(llava: Any) -> None:
    which = policy(protect={"use": Protect}, stride={"use": "control/stride", "keep": {2: 7, 4: 1}})
    with torch.no_grad():
        live = kept(llava, which, prompt([("I", 5)]))[:, 0, 1:17]
    assert live.sum(1).tolist() == [16, 16, 7, 7, 3, 3]
    assert live[:, :3].all()
    assert live[2, 3:].tolist() == evenly(torch.arange(13), 4, 13).tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_pooling_is_the_mean_of_each_window(rows: int, columns: int, high: int, wide: int) -> None:
    features = torch.randn(rows * columns, 3, generator=torch.Generator().manual_seed(rows * 13 + columns))
    pooled, places = pool(features, (rows, columns), (high, wide))
    grid = torch.arange(rows * columns).view(rows, columns)
    windows = [grid[r : r + high, c : c + wide] for r in range(0, rows, high) for c in range(0, columns, wide)]
    expected = torch.stack([features[own.flatten()].mean(0) for own in windows])
    assert (pooled - expected).abs().max() < 1e-6
    middles = [int(own[(own.shape[0] - 1) // 2, (own.shape[1] - 1) // 2]) for own in windows]
    assert places.tolist() == middles == sorted(middles)


@torch.no_grad()
def test_pooled_tokens_reach_the_llm_in_the_middle_of_their_windows(llava: Any) -> None:
    inputs, seen = prompt([(3, "I", 5)]), []
    handle = llava.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    llava(**inputs)
    with dropflow.attach(llava, policy(pool={"use": "control/pool", "window": (2, 2)})) as flow:
        llava(**inputs)
        live = flow.live()[0, 0, 4:20]
        assert flow.report().entry_visual_tokens == 4
    handle.remove()
    expected, places = pool(seen[0][0, 4:20], (4, 4), (2, 2))
    assert live.nonzero()[:, 0].tolist() == places.tolist() == [0, 2, 8, 10]
    assert relative_error(seen[1][0, 4:20][places], expected) < 1e-6


def test_pooling_needs_the_whole_grid(llava: Any) -> None:
    which = policy(random={"use": "control/random", "encode": 6}, pool={"use": "control/pool"})
    with (
        dropflow.attach(llava, which),
        pytest.raises(DecisionError, match=r"image 0 has 6 rows.*\(4, 4\); pool before"),
    ):
        llava(**prompt([(3, "I", 5)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either `keep`"),
        ({"keep": {2: 3}, "encode": 4}, "expected either `keep`"),
        ({"keep": {0.5: 4, 3: 2}}, r"stages\.r\.keep\.3: boundary 3 is named twice on a model of 6 layers"),
        ({"encode": 4, "seed": -1}, "greater than or equal to 0"),
        ({"keep": {2: 3}, "place": "pixels"}, "`place` says where `encode` works, which is missing; give"),
        ({"encode": 4, "place": -1}, r"stages\.r\.place"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        resolve(dropflow.load_policy(policy(r={"use": "control/random", **options})), BackboneShape(6, 16))


def test_a_window_beyond_the_grid_pools_all_of_it() -> None:
    features = torch.arange(12.0)[:, None]
    pooled, places = pool(features, (3, 4), (2**31 - 1, 2))
    assert (pooled[:, 0].tolist(), places.tolist()) == ([4.5, 6.5], [4, 6])


@pytest.mark.parametrize("stage", ["control/random", "control/stride"])
@torch.no_grad()
def test_rows_are_dropped_at_the_place_that_is_named(llava: Any, stage: str) -> None:
    inputs = prompt([(3, "I", 5)])
    visual = inputs["input_ids"][0] == IMAGE
    found = []
    for place in ("output", 0, 2):
        with dropflow.attach(llava, policy(s={"use": stage, "encode": 4, "place": place})) as flow:
            llava(**inputs)
            found.append(flow.live()[0, 0, visual])
            through = flow.report().tower_visual_tokens
        assert found[-1].sum() == 4
        depth = llava.config.vision_config.num_hidden_layers
        assert through == (16 if place == "output" else 4 + 12 * place / depth)
    assert all(torch.equal(own, spread(4, (4, 4))) for own in found) == (stage == "control/stride")


@torch.no_grad()
def test_a_stride_on_pixels_keeps_every_second_unit_of_every_second_row() -> None:
    tiny = tiny_models()["qwen2_vl"][1]
    model, (inputs, _) = tiny.model(), tiny.prompt([(3, "I", 5)])
    with dropflow.attach(model, policy(s={"use": "control/stride", "encode": 2, "place": "pixels"})) as flow:
        model(**inputs)
        live = flow.live()[0, 0, inputs["input_ids"][0] == IMAGE]
        assert flow.report().tower_visual_tokens == 2
    assert live.tolist() == spread(2, (2, 4)).tolist()

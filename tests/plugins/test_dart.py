"""DART: recorded choices, exact budgets, and what text and neighbours may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_goldens import FEW, recorded
from tiny import IMAGE, policy, prompt, tiny_llava

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import PolicyError
from dropflow.operators.selection import top
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape
from dropflow_dart.pivots import even_quotas, key_sizes, least_alike, published_order, turned_key_sizes

STAGE = {"use": "dart/duplication"}


@pytest.mark.parametrize("case", recorded("dart"))
def test_recorded_choices(case: str) -> None:
    golden = recorded("dart")[case]
    start, image, text = golden["S_N_T"].tolist()
    sizes = key_sizes(golden["keys"][0])
    own = start + top(sizes[start : start + image], len(golden["image_pivots"]))
    asks = start + image + top(sizes[start + image : start + image + text], len(golden["text_pivots"]))
    assert torch.equal(own, golden["image_pivots"])
    assert torch.equal(asks, golden["text_pivots"])
    order = published_order([*own.tolist(), *asks.tolist()])
    assert order == golden["pivot_iteration_order"].tolist()
    slots = torch.arange(start, start + image)
    taken = least_alike(
        golden["hidden_normed"][0], slots[~torch.isin(slots, own)], order, [golden["quota"]] * len(order)
    )
    assert torch.equal(torch.cat((own, taken)).sort().values, golden["retained_sorted"])


@FEW
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 9))
def test_each_pivot_takes_the_least_alike_of_what_is_left(seed: int, pivots: int, quota: int) -> None:
    states = torch.randn(40, 5, generator=torch.Generator().manual_seed(seed))
    pool = list(range(6, 30))
    expected: list[int] = []
    for pivot in range(pivots):
        cosines = torch.nn.functional.cosine_similarity(states, states[pivot : pivot + 1], dim=1)
        chosen = sorted((i for i in pool if i not in expected), key=lambda i: float(cosines[i]))[:quota]
        expected += chosen
    for scaled in (states, states * torch.arange(1, 41)[:, None]):
        found = least_alike(scaled, torch.tensor(pool), range(pivots), [quota] * pivots)
        assert found.tolist() == expected


def test_sizes_forget_how_far_rope_has_turned_a_key() -> None:
    keys = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.1])
    first, second = keys[..., :2], keys[..., 2:]
    turned = torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)
    assert torch.equal(turned_key_sizes(turned), turned_key_sizes(keys))
    assert not torch.allclose(key_sizes(turned), key_sizes(keys), rtol=1e-2)
    assert torch.equal(turned_key_sizes(keys).argsort(), (keys**2).sum((0, 2)).argsort())


def test_quotas_add_up() -> None:
    assert even_quotas(124, 8) == [16, 16, 16, 16, 15, 15, 15, 15]
    assert all(sum(even_quotas(total, 7)) == total for total in range(30))


def visual(flow: dropflow.Flow, inputs: dict[str, Any]) -> torch.Tensor:
    return flow.live() & (inputs["input_ids"] == IMAGE)


@pytest.mark.parametrize(("reference", "kept"), [(False, 7), (True, 3 + 1 * 5)])
@torch.no_grad()
def test_counts_at_the_boundary_and_the_state_of_earlier_layers(reference: bool, kept: int) -> None:
    model, inputs = tiny_llava(), prompt()
    options = {"at": 2, "keep": 7, "image_pivots": 3, "text_pivots": 2, "reference": reference}
    with dropflow.attach(model, policy(dart=STAGE | options)) as flow:
        model(**inputs)
        assert visual(flow, inputs).sum(2).tolist() == [[16, 32, 0]] * 2 + [[kept, 2 * kept, 0]] * 4
        assert flow.plan.schedule().per_layer == (16, 16, *[kept] * 4)


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_the_choice_is_the_formulas_on_the_models_own_keys_and_norm(reference: bool) -> None:
    model, inputs = tiny_llava(), prompt([(3, "I", 5)])
    text = model.get_decoder()
    got: list[torch.Tensor] = []
    handle = text.layers[2].register_forward_pre_hook(lambda _, args: got.append(args[0]))
    cache = getattr(model(**inputs, use_cache=True), CACHE_ARGUMENT)
    handle.remove()
    keys, states = cache.layers[1].keys[0].transpose(0, 1).flatten(1), text.norm(got[0])[0]
    sizes = keys.abs().sum(1) if reference else (keys**2).sum(1).sqrt()
    own, asks = 4 + top(sizes[4:20], 3), 20 + top(sizes[20:25], 2)
    pool = torch.tensor([slot for slot in range(4, 20) if slot not in own.tolist()])
    pivots = [*own.tolist(), *asks.tolist()]
    order, quotas = (list(set(pivots)), [2] * 5) if reference else (pivots, [2, 2, 1, 1, 1])
    expected = torch.cat((own, least_alike(states, pool, order, quotas)))
    options = {"at": 2, "keep": 10, "image_pivots": 3, "text_pivots": 2, "reference": reference}
    with dropflow.attach(model, policy(dart=STAGE | options)) as flow:
        model(**inputs)
        assert visual(flow, inputs)[2, 0].nonzero()[:, 0].tolist() == expected.sort().values.tolist()


@torch.no_grad()
def test_the_question_matters_but_no_neighbour_does() -> None:
    model, inputs = tiny_llava(), prompt([(3, "I", 9)] * 3)
    inputs["pixel_values"] = inputs["pixel_values"][:1].expand(3, -1, -1, -1)
    for options in ({"keep": 9}, {"keep": 9, "reference": True}):
        with dropflow.attach(model, policy(dart=STAGE | options)) as flow:
            model(**inputs)
            together = visual(flow, inputs)[-1]
            for sample in range(3):
                alone = {key: value[sample : sample + 1] for key, value in inputs.items()}
                model(**alone)
                assert torch.equal(visual(flow, alone)[-1, 0], together[sample])
    assert len({tuple(row.tolist()) for row in together}) > 1


@torch.no_grad()
def test_little_text_and_large_budgets() -> None:
    model = tiny_llava()
    for samples, keep, kept in (([(5, "I")], 7, 7), ([("I", 1)], 7, 7), ([("I", 3)], 15, 15), ([("I", 3)], 16, 16)):
        inputs = prompt(samples)
        for reference in (False, True):
            with dropflow.attach(model, policy(dart=STAGE | {"keep": keep, "reference": reference})) as flow:
                model(**inputs)
                found = int(visual(flow, inputs)[-1].sum())
                assert found == kept if not reference else found >= min(kept - 3, 16)


@pytest.mark.parametrize("keep", [0, 2, 3, 7, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("text", "pivots"), [(9, (3, 2)), (2, (3, 4)), (9, (2, 4))])
@torch.no_grad()
def test_as_released_the_number_is_the_forecast_one(keep: float, text: int, pivots: tuple[int, int]) -> None:
    model, inputs = tiny_llava(), prompt([(3, "I", text)])
    image_pivots, text_pivots = pivots
    options = {"at": 2, "keep": keep, "image_pivots": image_pivots, "text_pivots": text_pivots, "reference": True}
    asked = int(keep * 16) if isinstance(keep, float) else keep
    expected = 16 if asked == 16 else min(image_pivots + asked // sum(pivots) * sum(pivots), 16)
    with dropflow.attach(model, policy(dart=STAGE | options)) as flow:
        model(**inputs)
        assert int(visual(flow, inputs)[-1].sum()) == expected
        assert flow.plan.schedule().per_layer[-1] == expected


def test_published_numbers_of_tokens() -> None:
    for keep, kept in ((128, 132), (192, 196), (64, 68)):
        found = resolve(dropflow.load_policy(f"dart-{keep}"), BackboneShape(32, 576)).schedule()
        assert found.per_layer == (576,) * 2 + (kept,) * 30
    for share, kept in ((0.333, 188), (0.222, 124), (0.111, 60), (1.0, 576)):
        shared = dropflow.load_policy("dart-128", [f"stages.dart.keep={share}"])
        assert resolve(shared, BackboneShape(32, 576)).schedule().per_layer == (576,) * 2 + (kept,) * 30
        found = resolve(shared, BackboneShape(32, None))
        assert found.schedule(576).per_layer[-1] == kept, "as on a backbone whose images differ in size"
    with pytest.raises(PolicyError, match=r"stages\.d\.at: at boundary 0 the keys of layer -1 choose the pivots"):
        resolve(dropflow.load_policy(policy(d=STAGE | {"at": 0})), BackboneShape(32, 576))


@torch.no_grad()
def test_protected_tokens_stay_and_count() -> None:
    model, inputs = tiny_llava(), prompt()
    visual = inputs["input_ids"] == IMAGE
    for share, kept in ((0.25, 6), (0.5, 8)):  # 4 and 8 of 16 are protected, and 6 may stay
        stages = policy(key={"use": "mustdrop/key-set", "share": share}, dart={**STAGE, "at": 2, "keep": 6})
        with dropflow.attach(model, policy(key=stages["stages"]["key"])) as flow:
            held = [
                flags[:, 1] > 0 for flags in model.get_image_features(inputs["pixel_values"]).deepstack_features[-1]
            ]
        with dropflow.attach(model, stages) as flow:
            model(**inputs)
            live = flow.live()[2]
        assert (live & visual).sum(1).tolist() == [kept, 2 * kept, 0]
        assert bool(live[visual][torch.cat(held)].all())
        assert sum(int(own.sum()) for own in held) == 3 * 16 * share

"""VisionSelector: the recorded scores, soft masks, gradients and curriculum of the released code, and the stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_goldens import FEW
from tiny import policy, prompt, tiny_llava
from torch import Tensor

import dropflow
from dropflow import Encode, EncodeCall
from dropflow.errors import PolicyError
from dropflow.policy.plan import resolve
from dropflow.testing import assert_stage_conforms, tiny_models
from dropflow.units import BackboneShape, Scale
from dropflow_visionselector.scoring import Scorer, constraint, soft_mask
from dropflow_visionselector.selector import Selector, SelectorOptions

DATA = Path(__file__).parents[1] / "data" / "visionselector"
STAGE = "visionselector/scorer"
NAMES = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and options of one recorded case."""
    with np.load(DATA / f"selector_{name}.npz") as arrays:
        found = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
        return found, json.loads(str(arrays["meta"]))


def scorer_of(arrays: dict[str, Tensor]) -> Scorer:
    """A scorer with recorded weights, of whatever width."""
    scorer = Scorer(arrays["q_weight"].shape[1])
    for projection, short in ((scorer.q_proj, "q"), (scorer.k_proj, "k")):
        projection.weight = torch.nn.Parameter(arrays[f"{short}_weight"].clone())
        projection.bias = torch.nn.Parameter(arrays[f"{short}_bias"].clone())
    return scorer


def stage(**options: Any) -> Selector:
    context = dropflow.StageContext("selector", Scale(BackboneShape(4, None)), dropflow.Window(0, 4))
    return Selector(SelectorOptions(**options), context)


def payload(rows: tuple[Tensor, ...], scorer: Scorer, *, training: bool, progress: float = 0.0) -> EncodeCall:
    def never(_: int) -> Any:
        raise AssertionError("reads no layer of the encoder")

    return EncodeCall(
        boundary=None,
        features=rows,
        prefix_rows=rows[0].new_zeros(len(rows), 0, rows[0].shape[1]),
        places=tuple(torch.arange(len(own)) for own in rows),
        sizes=tuple(torch.ones(len(own)) for own in rows),
        grids=(None,) * len(rows),
        prefix=0,
        has_cls=False,
        tower=never,
        members=never,
        training=training,
        module=scorer,
        progress=progress,
    )


def answer(own: Selector, call: EncodeCall) -> Encode:
    found = own.encode(call)
    assert found is not None
    return found


def assert_close(value: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(value, expected.to(value), rtol=rtol, atol=atol)


def test_recorded_scores() -> None:
    arrays, _ = golden("scores")
    scorer = scorer_of(arrays)
    assert_close(scorer(arrays["rows"][0]), arrays["out_scores"][0])
    query, key = (p(arrays["rows"][0]) for p in (scorer.q_proj, scorer.k_proj))
    assert_close((query @ key.T / 6**0.5).mean(1), arrays["out_scores"][0])


@pytest.mark.parametrize("name", ["soft_a", "soft_equal"])
def test_recorded_soft_masks_and_their_gradients(name: str) -> None:
    arrays, meta = golden(name)
    scores = arrays["scores"][0].clone().requires_grad_()
    soft = soft_mask(scores, torch.zeros_like(scores).long(), torch.tensor([float(meta["k"])]))
    assert_close(soft, arrays["out_soft"][0])
    assert_close(torch.sigmoid(scores + arrays["out_shift"][0]), soft.detach())
    soft.backward(arrays["upstream"][0])
    assert scores.grad is not None
    assert_close(scores.grad, arrays["out_grad"][0])


def test_recorded_training_step() -> None:
    arrays, meta = golden("train_a")
    scorer = scorer_of(arrays)
    found = answer(stage(keep=meta["budget"]), payload((arrays["rows"],), scorer, training=True))
    assert found.rows is not None
    assert found.loss is not None
    assert_close(found.rows[0], arrays["out_rows"])
    task = (found.rows[0] - arrays["target"]).square().mean()
    assert_close(task, arrays["out_task"])
    assert_close(found.loss, meta["lam"] * arrays["out_bce"])
    assert_close(task + found.loss, arrays["out_loss"])
    (task + found.loss).backward()
    for name, value in scorer.named_parameters():
        own = f"grad_{name[0]}_{name.rpartition('.')[2]}"
        assert_close(value.grad, arrays[own], rtol=2e-3)  # type: ignore[arg-type]
    hard = torch.zeros(25, dtype=torch.bool)
    hard[scorer(arrays["rows"]).detach().argsort(descending=True, stable=True)[: meta["k"]]] = True
    assert torch.equal(hard, arrays["out_hard"].bool())
    assert constraint(arrays["out_soft"], hard).item() == pytest.approx(arrays["out_bce"].item(), rel=1e-4)


def test_recorded_curriculum() -> None:
    arrays, meta = golden("curriculum_a")
    scorer, own = scorer_of(arrays), stage(keep=meta["budget"])
    optimizer = torch.optim.SGD(scorer.parameters(), lr=meta["lr"])
    for step in range(meta["steps"]):
        found = answer(own, payload((arrays["rows"],), scorer, training=True, progress=step / meta["steps"]))
        assert found.rows is not None
        assert found.loss is not None
        task = (found.rows[0] - arrays["target"]).square().mean()
        assert_close(task, arrays["out_task"][step], rtol=2e-3)
        assert_close(found.loss / arrays["out_lam"][step], arrays["out_bce"][step], rtol=2e-3)
        assert_close(task + found.loss, arrays["out_loss"][step], rtol=2e-3)
        optimizer.zero_grad()
        (task + found.loss).backward()
        optimizer.step()
    for name, value in scorer.named_parameters():
        assert_close(value.detach(), arrays[f"end_{name[0]}_{name.rpartition('.')[2]}"], rtol=5e-3, atol=5e-4)
    kept = answer(own, payload((arrays["rows"],), scorer, training=False)).keep
    assert kept is not None
    assert torch.equal(kept[0].nonzero()[:, 0], arrays["out_kept"])


@pytest.mark.parametrize("name", ["infer_a", "infer_trunc"])
def test_recorded_inference(name: str) -> None:
    arrays, meta = golden(name)
    found = answer(stage(keep=meta["budget"]), payload((arrays["rows"],), scorer_of(arrays), training=False))
    assert found.keep is not None
    assert torch.equal(found.keep[0].nonzero()[:, 0], arrays["out_kept"])
    assert torch.equal(arrays["rows"][found.keep[0]], arrays["out_rows"])


@FEW
@given(st.integers(0, 10**6), st.integers(2, 40), st.data())
def test_soft_masks_sum_to_k_rise_with_the_score_and_ignore_a_constant(seed: int, count: int, data: Any) -> None:
    dice = torch.Generator().manual_seed(seed)
    scores = (3 * torch.randn(count, generator=dice)).requires_grad_()
    k = torch.tensor([float(data.draw(st.integers(1, count - 1)))])
    group = torch.zeros(count, dtype=torch.long)
    soft = soft_mask(scores, group, k)
    assert soft.sum().item() == pytest.approx(k.item(), rel=1e-5)
    order = scores.detach().argsort()
    assert (soft.detach()[order].diff() >= -1e-7).all()
    assert_close(soft_mask(scores.detach() + 7, group, k), soft.detach(), atol=2e-5)
    soft.backward(torch.randn(count, generator=dice))
    assert scores.grad is not None
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-5)
    shuffle = torch.randperm(count, generator=dice)
    assert_close(soft_mask(scores.detach()[shuffle], group, k), soft.detach()[shuffle])
    hard = torch.zeros(count)
    hard[order[-int(k) :]] = 1
    assert_close(soft_mask(1e4 * scores.detach(), group, k), hard, atol=1e-3)


def test_masks_in_low_precision_still_sum_to_k() -> None:
    """The released bisection in bfloat16 gives 40.12 for 40."""
    scores = torch.randn(200, generator=torch.Generator().manual_seed(0)).bfloat16()
    soft = soft_mask(scores, torch.zeros(200, dtype=torch.long), torch.tensor([40.0]))
    assert soft.sum().item() == pytest.approx(40, rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert constraint(soft, soft > 0.5).dtype == torch.float32


def test_budgets_at_which_the_released_code_fails() -> None:
    """All rows, a single row, and less than one row."""
    scorer, rows = Scorer(8), torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    whole = answer(stage(keep=1.0), payload((rows, rows[:1]), scorer, training=False))
    assert whole.keep is not None
    assert [int(keep.sum()) for keep in whole.keep] == [9, 1]
    for share in (1.0, 0.05):
        found = answer(stage(keep=share), payload((rows, rows[:1]), scorer, training=True))
        assert found.rows is not None
        assert found.loss is not None
        assert torch.isfinite(found.loss)
        assert (found.rows[0] / rows).detach().mean(1).sum().item() == pytest.approx(8 if share == 1 else 1, rel=1e-4)
        assert torch.equal(found.rows[1], rows[:1])
    few = answer(stage(keep=0.05), payload((rows,), scorer, training=False)).keep
    assert few is not None
    assert few[0].sum() == 1


def test_a_fresh_scorer_keeps_the_first_of_equal_rows() -> None:
    found = answer(stage(keep=0.3), payload((torch.ones(10, 8),), Scorer(8), training=False))
    assert found.keep is not None
    assert found.keep[0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_images_share_a_budget_only_where_asked() -> None:
    scorer, dice = Scorer(8), torch.Generator().manual_seed(0)
    for weight in (scorer.q_proj.weight, scorer.k_proj.weight):
        torch.nn.init.normal_(weight, generator=dice)
    rows = (torch.randn(10, 8, generator=dice) + 2, torch.randn(20, 8, generator=dice) - 2)
    sums: dict[str, list[float]] = {}
    for scope in ("image", "call"):
        found = answer(stage(keep=0.2, scope=scope), payload(rows, scorer, training=True))
        assert found.rows is not None
        sums[scope] = [float((new / old).detach().mean(1).sum()) for new, old in zip(found.rows, rows, strict=True)]
    assert sums["image"] == pytest.approx([2, 4], rel=1e-4)
    assert sum(sums["call"]) == pytest.approx(6, rel=1e-4)
    assert abs(sums["call"][0] - 2) > 0.1


def test_a_forward_in_training_has_every_row_and_the_constraint() -> None:
    model = tiny_llava()
    model.requires_grad_(False)
    inputs = prompt([(3, "I", 9), ("I", 2, "I", 12)])
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 40, -100)
    with dropflow.attach(model.train(), policy(selector={"use": STAGE, "keep": 0.25})) as flow:
        scorer = flow.modules["selector"]
        for weight in (scorer.q_proj.weight, scorer.k_proj.weight):  # type: ignore[union-attr]
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
        losses, added = [], []
        for progress in (0.0, 1.0):
            flow.progress = progress
            output = model(**inputs, labels=labels)
            assert flow.stage_loss is not None
            added.append(flow.stage_loss.item())
            losses.append(output.loss.item() - added[-1])
            assert flow.report().layers[0].visual_tokens == 24
        assert added[1] == pytest.approx(20 * added[0], rel=1e-4)  # weights 0.1 and 2.0
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        output.loss.backward()
        assert {name for name, own in model.named_parameters() if own.grad is not None} == {
            f"dropflow_stages.selector.{name}" for name in NAMES
        }
        model.eval()(**inputs)
        assert flow.report().layers[0].visual_tokens == 6


def test_gradients_of_the_scorer_are_those_of_finite_differences() -> None:
    model = tiny_llava().double().train()
    inputs = prompt([(3, "I", 9)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 22, -100)
    with dropflow.attach(model, policy(selector={"use": STAGE, "keep": 0.25})) as flow:
        flow.progress = 0.5
        scorer: Any = flow.modules["selector"]
        dice = torch.Generator().manual_seed(1)
        for weight in (scorer.q_proj.weight, scorer.k_proj.weight):
            torch.nn.init.normal_(weight, std=0.3, generator=dice)
        model(**inputs, labels=labels).loss.backward()
        assert scorer.q_proj.bias.grad.abs().max() < 1e-6  # adds the same to every score
        for weight in (scorer.q_proj.weight, scorer.k_proj.weight, scorer.k_proj.bias):
            direction = torch.nn.functional.normalize(weight.grad, dim=None)
            losses = []
            for step in (1e-3, -1e-3):
                weight.data += step * direction
                losses.append(model(**inputs, labels=labels).loss.item())
                weight.data -= step * direction
            assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(weight.grad.norm().item(), rel=1e-2)


def test_a_published_checkpoint_is_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    arrays = {name: torch.randn(16, 32) if name.endswith("weight") else torch.randn(16) for name in NAMES}
    for prefix in ("visual.", "model.visual."):
        save_file({f"{prefix}importance_scorer.{n}": v for n, v in arrays.items()}, tmp_path / "model.safetensors")
        with dropflow.attach(tiny_llava(), policy(s={"use": STAGE}), weights=tmp_path) as flow:
            assert all(torch.equal(value, arrays[name]) for name, value in flow.modules["s"].state_dict().items())


@pytest.mark.parametrize(("share", "tokens"), [(10, 57), (20, 115), (30, 172)])
def test_published_settings(share: int, tokens: int) -> None:
    found = resolve(dropflow.load_policy(f"visionselector-{share}"), BackboneShape(32, 576)).schedule()
    assert found.per_layer == (tokens,) * 32


def test_an_untrained_scorer_decides_nothing(tmp_path: Path) -> None:
    model = tiny_llava()
    with pytest.raises(PolicyError, match=r"stages\.selector: decides nothing before it is trained"):
        dropflow.attach(model, "visionselector-20")
    with dropflow.attach(model.train(), "visionselector-20"):
        model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for which in (None, "visionselector-20", "visionselector-10"):
        with dropflow.attach(loaded, which) as flow:
            assert set(flow.modules) == {"selector"}


def test_it_meets_the_guarantees() -> None:
    models = {name: tiny_models()[name] for name in ("llava", "qwen2_5_vl")}
    assert [cell.outcome for cell in assert_stage_conforms(STAGE, None, models)] == ["run", "run"]

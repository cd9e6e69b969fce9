"""`select: soft` of the concave pyramid: the same tokens as `exact`, and a choice that is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BOS, IMAGE, policy, prompt, tiny_llava

import dropflow
from dropflow.operators.relaxation import soft_top, standardised
from dropflow.testing import assert_stage_conforms, tiny_models
from dropflow_hidrop import topk
from dropflow_hidrop.topk import soft_weights

PYRAMID = {"use": "hidrop/concave-pyramid", "keep": {2: 7, 4: 2}}


def hidrop(select: str) -> dict[str, Any]:
    return policy(
        inject={"use": "hidrop/late-injection", "at": 1},
        pyramid=PYRAMID | {"select": select},
        exit={"use": "hidrop/early-exit", "at": 5},
    )


def labelled() -> dict[str, Any]:
    inputs = prompt([(3, "I", 9), ("I", 2, "I", 12), (8,)])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs | {"labels": labels}


def trained(model: Any, select: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    with dropflow.attach(model.train(), hidrop(select)) as flow:
        loss = model(**labelled()).loss
        loss.backward()
        live = flow.live()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), live, found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_is_that_of_exact_and_the_choice_has_gradient(attention: str) -> None:
    """With the output of a boundary's own attention cut off, its q and k are there for ranking alone."""
    model = tiny_llava(attention=attention)
    ranking = model.get_decoder().layers[2].self_attn
    torch.nn.init.zeros_(ranking.o_proj.weight)
    hard_loss, hard_live, hard = trained(model, "exact")
    soft_loss, soft_live, soft = trained(model, "soft")
    assert torch.equal(soft_live, hard_live)
    assert soft_loss.item() == pytest.approx(hard_loss.item(), rel=1e-6)
    for name in ("q_proj", "k_proj"):
        weight = f"model.language_model.layers.2.self_attn.{name}.weight"
        assert (hard[weight] == 0).all()
        assert soft[weight].abs().max() > 1e-5
    for weight in ("model.language_model.layers.1.mlp.up_proj.weight", "model.multi_modal_projector.linear_1.weight"):
        assert not torch.allclose(soft[weight], hard[weight], rtol=1e-3), "the states ranked are detached"


def test_without_gradients_it_is_exact_bit_by_bit() -> None:
    model, inputs = tiny_llava(), labelled()
    found: dict[str, list[torch.Tensor]] = {}
    for select in ("exact", "soft"):
        with dropflow.attach(model, hidrop(select)) as flow:
            found[select] = [model.eval()(**inputs).loss, flow.live()]
            with torch.no_grad():
                found[select] += [model.train()(**inputs).loss, flow.live(), model.eval()(**prompt()).logits]
    for soft, exact in zip(found["soft"], found["exact"], strict=True):
        assert torch.equal(soft, exact)


def test_it_meets_the_guarantees() -> None:
    models = {"llava": tiny_models()["llava"]}
    options = {"keep": {0.35: 0.5, 0.7: 0.2}, "select": "soft"}
    (cell,) = assert_stage_conforms("hidrop/concave-pyramid", options, models)
    assert cell.outcome == "run"


def test_gradients_are_those_of_the_relaxed_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences of the loss with weights 1 + soft - soft at the start, the kept tokens being the same."""
    start: list[torch.Tensor] = []
    asked = 0

    def relaxed(scores: torch.Tensor, image: torch.Tensor, keep: torch.Tensor, temperature: float) -> torch.Tensor:
        nonlocal asked
        soft = soft_top(standardised(scores.log(), image), image, keep, temperature=temperature)
        if asked == len(start):
            start.append(soft.detach())
        asked += 1
        return 1 + soft - start[asked - 1]

    model, inputs = tiny_llava().train(), labelled()
    _, _, gradient = trained(model, "soft")
    weights = dict(model.named_parameters())
    monkeypatch.setattr(topk, "soft_weights", relaxed)
    dice = torch.Generator().manual_seed(1)
    with dropflow.attach(model, hidrop("soft")) as flow:
        model(**inputs)
        live = flow.live()
        for name in ("layers.2.self_attn.q_proj", "layers.2.self_attn.k_proj", "layers.1.mlp.up_proj"):
            weight = weights[f"model.language_model.{name}.weight"].data
            own = gradient[f"model.language_model.{name}.weight"]
            direction = torch.nn.functional.normalize(
                own / own.norm() + torch.randn(own.shape, generator=dice) / own.numel() ** 0.5, dim=None
            )
            losses = []
            for step in (0.02, -0.02):
                asked = 0
                weight += step * direction
                losses.append(model(**inputs).loss.item())
                assert torch.equal(flow.live(), live)
                weight -= step * direction
            assert (losses[0] - losses[1]) / 0.04 == pytest.approx(float((own * direction).sum()), rel=0.01), name


def test_weights_depend_on_what_tells_tokens_of_an_image_apart() -> None:
    scores = torch.rand(1, 8, dtype=torch.float64) / 20
    image = torch.tensor([[0, 0, 0, 0, 0, -1, 1, 1]])
    keep = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0]], dtype=torch.bool)

    def gradient(values: torch.Tensor) -> torch.Tensor:
        values = values.clone().requires_grad_()
        weights = soft_weights(values, image, keep, 0.5)
        assert torch.equal(weights, torch.ones_like(weights))
        (weights[0, :5] * torch.arange(5)).sum().backward()
        return (values.grad * values).detach()  # with respect to the logarithm

    once = gradient(scores)
    assert (once[0, :5] != 0).all()
    assert (once[0, 5:] == 0).all()
    assert once.sum().item() == pytest.approx(0, abs=1e-12)
    assert torch.allclose(gradient(scores / 100), once)  # text may take what share of the attention it likes
    unseen = scores.clone()
    unseen[0, 1] = 0
    assert torch.isfinite(gradient(unseen)).all()


def kept_rate(select: str, seed: int, steps: int = 150, samples: int = 32) -> float:
    """Train from random weights where the answer is told by one marked token of 16, of which 4 stay.

    Only ranking can find it: the boundary's own attention is cut off, so that its q and k serve nothing else. Returns
    how often the marked token stayed in the last 20 steps.
    """
    model = tiny_llava(layers=3, seed=seed).train()
    attention = model.get_decoder().layers[1].self_attn
    torch.nn.init.zeros_(attention.o_proj.weight)
    for weight in (attention.o_proj.weight, attention.v_proj.weight):
        weight.requires_grad_(False)
    dice = torch.Generator().manual_seed(100 + seed)
    directions = torch.linalg.qr(torch.randn(32, 32, generator=dice))[0]
    mark, answers = 1.5 * directions[0], 2 * directions[1:5]
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], 5e-3)
    ids = torch.tensor([BOS, *[IMAGE] * 16, 5, 6, 0]).repeat(samples, 1)
    every, kept = torch.arange(samples), []
    pyramid = {"use": "hidrop/concave-pyramid", "keep": {1: 4}, "select": select, "temperature": 1.0}
    inject = {"use": "hidrop/late-injection", "at": 1}
    with dropflow.attach(model, policy(inject=inject, pyramid=pyramid)) as flow, flow.visual(ids == IMAGE):
        for _ in range(steps):
            visual = torch.randn(samples, 16, 32, generator=dice) / 2
            answer = torch.randint(0, 4, (samples,), generator=dice)
            place = torch.randint(0, 16, (samples,), generator=dice)
            visual[every, place] += mark + answers[answer]
            ids[:, -1] = 10 + answer
            text = model.get_input_embeddings()(ids)
            labels = ids.masked_fill(torch.arange(20) < 19, -100)
            model(inputs_embeds=torch.cat((text[:, :1], visual, text[:, 17:]), 1), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append(flow.live()[2][every, 1 + place].float().mean().item())
    return sum(kept[-20:]) / 20


@pytest.mark.slow
def test_a_useful_token_is_learned_to_be_kept_by_soft_selection_alone() -> None:
    """By chance it stays in 4 of 16 cases."""
    assert kept_rate("soft", seed=0) > 0.8
    assert kept_rate("exact", seed=0) < 0.4

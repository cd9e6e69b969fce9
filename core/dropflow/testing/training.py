"""The part of guarantee 2 that concerns training: loss and gradients equal those of the masked run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropflow.testing.case import MASK, Case, relative_error, text_inputs
from dropflow.testing.soft_weights import GivenWeights


def labelled(case: Case) -> dict[str, Any]:
    """The batch with the last two tokens of every sample as the answer."""
    inputs = case.inputs
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, real in enumerate(case.real):
        answer = real.nonzero()[-2:, 0]
        labels[row, answer] = inputs["input_ids"][row, answer]
    return inputs | {"labels": labels}


def check_training(case: Case) -> float:
    """Compare loss and gradients with those of the masked run; returns the largest relative error of the loss."""
    model, inputs = case.model.train(), labelled(case)
    try:
        with case.attach() as flow, text_inputs(case.text) as handed, GivenWeights(flow) as given:
            flow.progress = 0.5
            loss = model(**inputs).loss
            if flow.stage_loss is not None:  # which the masked run does not have
                loss = loss - flow.stage_loss
            live, encodes, merges = flow.live(), flow.plan.encode_at, flow.merges()
            log_weights = given.log_weights(*live.shape)
            loss.backward(retain_graph=log_weights is not None)
        got = _gradients(model)
        changes: dict[str, Any] = {"merges": merges, "log_weights": log_weights, **(handed[0] if encodes else {})}
        with case.oracle(model, live, case.adapter, **changes) as oracle:
            expected_loss = model(**inputs, use_cache=False).loss
            expected_loss.backward()
        given.backward()
        expected = _gradients(model)
    finally:
        model.eval()
    worst = relative_error(loss[None], expected_loss[None])
    allowed, most = case.tiny.tolerance, case.tiny.gradient_tolerance
    inside = {id(weight) for weight in case.adapter(model).text._modules["layers"].parameters()}
    decoder = {name for name, weight in model.named_parameters() if id(weight) in inside}
    if not worst < allowed:
        raise case.broken(MASK, f"the loss differs from the {oracle.name} run's by {worst:.1e}, allowed {allowed:.0e}")
    for name, gradient in expected.items():
        if encodes and name not in decoder:
            continue  # replaced embeddings disconnect the masked run from the modules that computed them
        scale = float(gradient.abs().max())
        error = float((got[name] - gradient).abs().max()) / scale if scale > 1e-6 else 0.0
        if not error < most:
            raise case.broken(
                MASK,
                f"the gradient of {name} differs from the {oracle.name} run's by {error:.1e}, allowed {most:.0e}",
            )
    return worst


def _gradients(model: Any) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found

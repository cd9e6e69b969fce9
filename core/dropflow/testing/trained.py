"""Checks the modules that stages train: built alike everywhere, trained, saved and loaded, refused where missing."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dropflow.engine.attach.attach import attach
from dropflow.engine.attach.flow import Flow
from dropflow.errors import PolicyError
from dropflow.policy.recorded import WEIGHTS
from dropflow.testing.case import ISOLATION, MASK, REFUSAL, Case
from dropflow.testing.training import labelled


def check_trained(case: Case) -> float:
    """Check what the stages of the case's policy train; nothing if they have no modules.

    Every process must build the same, all parameters must get a finite gradient, a module saved and loaded must decide
    the same, and weights that are missing must be refused.
    """
    with case.attach() as flow:
        if not flow.modules:
            return 0.0
        built = _states(flow.modules)
    torch.rand(1)  # another state of the generator
    with case.attach() as flow, tempfile.TemporaryDirectory() as folder:
        for name, value in _states(flow.modules).items():
            if not torch.equal(value, built[name]):
                raise case.broken(ISOLATION, f"{name} is built otherwise a second time; draw from torch's generator")
        _check_gradients(case, flow)
        with torch.no_grad():
            for module in flow.modules.values():
                for number, parameter in enumerate(module.parameters()):
                    dice = torch.Generator().manual_seed(number)
                    parameter.add_(torch.randn(parameter.shape, generator=dice), alpha=0.1)
            expected = case.model(**case.inputs).logits
        flow.save_stages(folder)
        flow.detach()
        with torch.no_grad(), attach(case.model, case.policy, adapter=case.adapter, weights=folder):
            if not torch.equal(case.model(**case.inputs).logits, expected):
                raise case.broken(ISOLATION, "a module that was saved and loaded again gives other logits")
        Path(folder, WEIGHTS).unlink()
        try:
            attach(case.model, case.policy, adapter=case.adapter, weights=folder).detach()
        except PolicyError:
            return 0.0
        raise case.broken(REFUSAL, "weights that are not there are not refused")


def _check_gradients(case: Case, flow: Flow) -> None:
    """Check that training reaches every parameter."""
    model, inputs = case.model.train(), labelled(case)
    flow.progress = 0.5
    try:
        model(**inputs).loss.backward()
        for name, module in flow.modules.items():
            for own, parameter in module.named_parameters():
                if parameter.requires_grad and (
                    parameter.grad is None or not bool(torch.isfinite(parameter.grad).all())
                ):
                    raise case.broken(MASK, f"stages.{name}: {own} gets no gradient, or one that is not finite")
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)


def _states(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Clones of all entries of the modules, by stage and name."""
    return {
        f"stages.{stage}: {name}": value.clone()
        for stage, module in modules.items()
        for name, value in module.state_dict().items()
    }

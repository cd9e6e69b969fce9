"""Training the modules that a policy's stages have: their progress, their weights, and the policy they come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from dropflow import Flow, Policy
from dropflow.errors import UnsupportedCall
from dropflow_lab.files import write_text

LEARNED = "learned.yaml"
"""File in the folder of a trained model with the learned policy, which needs no weights."""


class StageProgress(TrainerCallback):  # type: ignore[misc]  # transformers leaves it untyped
    """Tells a flow before every optimiser step how far training has come, for stages that change in its course."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Set the progress: the steps that are done, of all."""
        self._flow.progress = min(state.global_step / max(state.max_steps, 1), 1.0)


@contextmanager
def stages_in_float32(flow: Flow | None) -> Iterator[None]:
    """Put the modules' own numbers back after a block that converts the whole model to a lower precision."""
    modules = {} if flow is None else flow.modules
    kept = [(each, each.data) for module in modules.values() for each in module.parameters()]
    yield
    for each, data in kept:
        each.data = data


def write_learned(flow: Flow | None, folder: Path) -> None:
    """Write the learned policy to `LEARNED` in `folder`.

    Nothing without stages that learn, or where only weights can say what they have learned.
    """
    if flow is None or not flow.modules:
        return
    try:
        policy = flow.learned_policy()
    except UnsupportedCall:
        return
    head = f"# What training made of the policy {policy.name}: the same with plain options, without weights.\n"
    write_text(folder / LEARNED, head + _as_yaml(replace(policy, name=f"{policy.name}-learned")))


def _as_yaml(policy: Policy) -> str:
    """The policy as YAML, without options that have their default values."""
    stages = {
        name: {"use": stage.use, **stage.options.model_dump(exclude_defaults=True, exclude_none=True)}
        for name, stage in policy.stages.items()
    }
    data = {name: value for name, value in policy.to_dict().items() if name != "stages" and value not in ("", False)}
    return yaml.safe_dump(data | {"stages": stages}, sort_keys=False, default_flow_style=None, width=120)

"""What `explain` forecasts of a shipped stage, with any options, is what a model then does, or is left open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import policy, prompt, tiny_llava

import dropflow
from dropflow.errors import PolicyError
from dropflow.policy import registry
from dropflow.policy.expected import expected

DEPTHS = st.integers(0, 6) | st.floats(0.05, 1.0)
TOKENS = st.integers(0, 18) | st.floats(0.01, 1.0)
MODEL = tiny_llava()
INPUTS = prompt([(3, "I", 5), (1, "I", 2, "I", 9)])
KINDS = {name: registry.load(registry.STAGES, name) for name in registry.names(registry.STAGES)}
STAGES = [name for name, kind in KINDS.items() if "units" not in kind.needs and not kind.needs_training]
"""All but those that need a packed tower, which LLaVA is not, or that decide nothing before they are trained."""


def options_of(stage: str) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings of options; some fit no policy and are refused."""
    kind = registry.load(registry.STAGES, stage)
    drawn: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in kind.Options.model_fields.items():
        shape = expected(kind.Options, (name,))
        if shape == "boundary":
            drawn[name] = DEPTHS
        elif shape == "tokens":
            drawn[name] = TOKENS
        elif shape.startswith("a mapping {boundary: tokens"):
            drawn[name] = st.dictionaries(DEPTHS, TOKENS, min_size=1, max_size=3)
        elif field.annotation is bool:
            drawn[name] = st.booleans()
        elif field.annotation is int:
            drawn[name] = st.integers(0, 6)
    return st.fixed_dictionaries({}, optional=drawn).map(lambda one: {**kind.example, **one})


@torch.no_grad()
def compare(stage: str, options: dict[str, Any]) -> bool:
    """Whether the policy ran; fails where forecast and run differ."""
    try:
        flow = dropflow.attach(MODEL, policy(s={"use": stage, **options}))
    except PolicyError:
        return False
    with flow:
        said = flow.plan.schedule(16)
        MODEL(**INPUTS)
        live = flow.live()
    visual = INPUTS["input_ids"] == 98
    counts = (live & visual).sum(2)
    for layer, told in enumerate(said.per_layer):
        assert told is None or counts[layer].tolist() == [told, 2 * told], (stage, options, layer)
    return True


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_does_what_any_options_forecast(stage: str) -> None:
    ran: list[bool] = []

    @settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(options_of(stage))
    def holds(options: dict[str, Any]) -> None:
        ran.append(compare(stage, options))

    holds()
    assert any(ran)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("visionzip/dominant-contextual", {"dominant": 0, "contextual": 4}),
        ("visionzip/dominant-contextual", {"dominant": 0, "contextual": 0}),
        ("dart/duplication", {"at": 2, "reference": True, "keep": 0, "image_pivots": 2}),
    ],
)
def test_no_tokens_of_one_kind(stage: str, options: dict[str, Any]) -> None:
    assert compare(stage, options)

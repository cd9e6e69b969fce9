"""Shipped stages are loaded, and policies checked, without torch: it is imported where a hook first needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from dropflow.policy import registry

HEAVY = ("torch", "transformers", "jaxtyping", "numpy")
REPORT = f"print(json.dumps([said, [name for name in {HEAVY} if name in sys.modules]]))"


def said_and_imported(*lines: str) -> list[Any]:
    """What a new process puts into `said`, and the heavy packages that it imported on the way."""
    program = "\n".join(("import json, sys", *lines, REPORT))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_a_wrong_option_of_any_shipped_stage_is_refused_without_torch() -> None:
    names = registry.names(registry.STAGES)
    said, imported = said_and_imported(
        "import dropflow",
        "said = {}",
        f"for name in {names}:",
        "    try:",
        "        dropflow.load_policy({'name': 'p', 'stages': {'s': {'use': name, 'no_option': 1}}})",
        "    except dropflow.errors.PolicyError as error:",
        "        said[name] = 'stages.s.no_option' in str(error)",
    )
    assert said == dict.fromkeys(names, True)
    assert imported == []


def test_every_shipped_policy_is_resolved_and_described_without_torch() -> None:
    names = list(registry.policy_files())
    said, imported = said_and_imported(
        "import dropflow",
        "from dropflow.policy.plan import resolve",
        "from dropflow.policy.policy import schema",
        "said = []",
        f"for name in {names}:",
        "    policy = dropflow.load_policy(name)",
        "    tuned = policy.tuned_for",
        "    resolve(policy, dropflow.BackboneShape(tuned.layers, tuned.visual_tokens)).schedule()",
        "    said.append(name)",
        "schema()",
    )
    assert said == names
    assert imported == []


@pytest.mark.parametrize("words", [["check", "hidrop-64"], ["schema"], ["list", "stages"], ["explain", "hidrop-64"]])
def test_a_command_that_runs_no_model_needs_no_torch(words: list[str]) -> None:
    said, imported = said_and_imported(
        "from dropflow_lab.console.cli import app",
        "try:",
        f"    app({words})",
        "except SystemExit as end:",
        "    said = end.code",
    )
    assert said == 0
    assert imported == []

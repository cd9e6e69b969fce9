"""Writes what a profile chose as a policy file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dropflow_lab.files import write_text
from dropflow_lab.profile.figure import draw
from dropflow_lab.profile.profile import Profile


def policy_of(profile: Profile, name: str = "profiled") -> dict[str, Any]:
    """Return the chosen policy as plain data; a stage that would do nothing is left out.

    Boundaries are absolute. Keeps are counts, or shares of an image where images differ in size.
    """
    choice, tokens = profile.choice, profile.visual_tokens
    stages: dict[str, Any] = {}
    if choice.entry > 0:
        stages["inject"] = {"use": "hidrop/late-injection", "at": choice.entry}
    if choice.keep:
        keep = {at: round(count / tokens, 4) if profile.images_differ else count for at, count in choice.keep.items()}
        stages["pyramid"] = {"use": "hidrop/concave-pyramid", "keep": keep, "select": "exact"}
    if choice.exit < profile.layers:
        stages["exit"] = {"use": "hidrop/early-exit", "at": choice.exit}
    share = 1 - choice.average_visual_tokens / tokens
    return {
        "name": name,
        "description": f"{choice.average_visual_tokens:.4g} average visual tokens, {share:.1%} fewer",
        "tuned_for": {"layers": profile.layers, "visual_tokens": tokens},
        "positions": "persistent",
        "stages": stages,
    }


def policy_yaml(profile: Profile, name: str = "profiled") -> str:
    """Return the chosen policy as the text of a policy file, with the origin of each number."""
    loss = f"costs at most {profile.knobs.exit_loss:.1%} without training"
    head = (
        f"# Chosen by `dropflow profile` from {profile.samples} questions; profile.json next to it holds all numbers.\n"
        "# dropflow run --policy policy.yaml ...        override: --set stages.exit.at=N\n"
        "# inject: the onset of fusion; train the model through the policy, or leave this stage out\n"
        "# pyramid: where later layers attend to the same tokens as this one; keeps from the budget\n"
        f"# exit: the first boundary from which an exit {loss}\n"
    )
    return head + yaml.safe_dump(policy_of(profile, name), sort_keys=False, default_flow_style=None)


def write_profile(profile: Profile, folder: Path) -> None:
    """Write profile.json, policy.yaml and the figure as PNG and SVG to `folder`, replacing those of an earlier run."""
    write_text(folder / "profile.json", json.dumps(profile.to_json(), indent=2) + "\n")
    write_text(folder / "policy.yaml", policy_yaml(profile))
    draw(profile, [folder / "profile.png", folder / "profile.svg"])

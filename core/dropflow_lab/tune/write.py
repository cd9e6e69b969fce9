"""Writes what the tuner found: all numbers, the Pareto front as a figure, and the best policies as YAML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dropflow import BackboneShape, Policy
from dropflow_lab.files import replacing, write_text
from dropflow_lab.tune.study import Search, Trial
from dropflow_lab.tune.tune import Against, Point, Tuned, spent

UNITS = {
    "average_tokens": "visual tokens, average over layers",
    "flops": "FLOPs of the prefill, share of those without a policy",
    "kv": "KV cache after the prefill, share of that without a policy",
}
_FOUND, _PUBLISHED = "#0072B2", "#D55E00"  # Okabe and Ito's colours, which colour-blind people can tell apart


def plain_policy(policy: Policy, shape: BackboneShape, name: str, description: str) -> dict[str, Any]:
    """Return a policy with solved numbers as the data of a policy file, without options that are at their defaults."""
    stages = {
        stage: {"use": use.use, **use.options.model_dump(exclude_defaults=True, exclude_none=True)}
        for stage, use in policy.stages.items()
    }
    tuned_for = {"layers": shape.layers, "visual_tokens": shape.visual_tokens}
    tuned = {} if shape.visual_tokens is None else {"tuned_for": tuned_for}
    head = {"name": name, "description": description, **tuned, "positions": policy.positions}
    return head | {"stages": stages}


def file_of(tuned: Tuned) -> str:
    """Name of the best policy of one budget, and of its file."""
    budget = tuned.searched.budget
    return f"tuned-{budget.kind.replace('_', '-')}-{getattr(budget, budget.kind):g}"


def policy_yaml(tuned: Tuned, shape: BackboneShape, model: str, how: Search) -> str:
    """Return the best policy of one budget as the text of a policy file, with how it was found and what it scores."""
    best, held_out, name = tuned.best, tuned.held_out, file_of(tuned)
    tuning = len(best.verdict.kl)
    cost = f"{best.verdict.average_tokens:.4g} average visual tokens"
    score = held_out.score
    lines = [
        f"Found by `dropflow tune` for {model}: {len(tuned.searched.trials)} policies on {tuning} questions,",
        f"{how.trials} of them proposed by the search, with seed {how.seed}.",
        f"dropflow run --policy {name}.yaml        override: --set positions=compact",
        f"On {score.asked} other questions: {score.value:.1%} ({score.low:.1%} to {score.high:.1%}); "
        f"{held_out.dense.value:.1%} without a policy.",
        f"KL divergence from the model without a policy: {held_out.verdict.distance:.4g} nats.",
        *(f"{_against(one)}." for one in held_out.against[:3]),
    ]
    data = plain_policy(best.policy, shape, name, f"{cost}; tuned for closeness to the model without a policy")
    text: str = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
    return "".join(f"# {line}\n" for line in lines) + text


def _against(one: Against) -> str:
    gain = one.gain
    return f"Against {one.policy.name} at this budget: {gain.value:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})"


def to_json(tuned: Sequence[Tuned], points: Sequence[Point], kind: str, shape: BackboneShape, how: Search) -> Any:
    """Return everything found as plain data."""
    return {
        "search": asdict(how),
        "budgets": [_budget(one) for one in tuned],
        "front": [
            _trial(point.trial) | {"kind": kind, "measured": None if point.cost is None else asdict(point.cost)}
            for point in points
        ],
        "shape": {"layers": shape.layers, "visual_tokens": shape.visual_tokens},
    }


def _budget(tuned: Tuned) -> dict[str, Any]:
    held_out = tuned.held_out
    return {
        "budget": tuned.searched.budget.model_dump(exclude_none=True),
        "best": _trial(tuned.best),
        "held_out": {
            "kl": held_out.verdict.distance,
            "score": asdict(held_out.score),
            "dense": asdict(held_out.dense),
            "average_tokens": held_out.verdict.average_tokens,
            "against": [
                {
                    "policy": one.policy.to_dict(),
                    "kl": one.verdict.distance,
                    "closer": dict(zip(("value", "low", "high"), one.kl, strict=True)),
                    "gain": asdict(one.gain) | {"verdict": one.gain.verdict},
                }
                for one in held_out.against
            ],
        },
        "trials": [_trial(trial) for trial in tuned.searched.trials],
        "refused": tuned.searched.refused,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    verdict = trial.verdict
    return {
        "policy": trial.policy.to_dict(),
        "published": trial.published,
        "kl": verdict.distance,
        "agreement": sum(verdict.same) / len(verdict.same),
        "accuracy": sum(verdict.right) / len(verdict.right),
        "questions": len(verdict.kl),
        "stopped": verdict.stopped,
        "average_tokens": verdict.average_tokens,
        "flops": verdict.flops,
        "kv": verdict.kv,
    }


def draw(tuned: Sequence[Tuned], front: Sequence[Trial], kind: str, paths: Sequence[Path]) -> None:
    """Write the figure: divergence against cost, for every policy that answered all questions, and the front."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "dropflow", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes = figure.subplots()
        trials = [trial for one in tuned for trial in one.searched.trials if not trial.verdict.stopped]
        for published, color, label in ((False, _FOUND, "found"), (True, _PUBLISHED, "shipped, at this budget")):
            own = [trial for trial in trials if trial.published is published]
            places = [spent(trial.verdict, kind) for trial in own]
            axes.plot(places, [trial.verdict.distance for trial in own], "o", color=color, alpha=0.6, label=label)
        steps = [(spent(trial.verdict, kind), trial.verdict.distance) for trial in front]
        axes.step(*zip(*steps, strict=True), where="post", color="black", linestyle="--", linewidth=1, label="front")
        axes.set_xlabel(UNITS[kind])
        axes.set_ylabel("KL divergence from the model without a policy, nats")
        axes.set_ylim(bottom=0)
        axes.legend()
        for path in paths:
            with replacing(path) as part:
                figure.savefig(part, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else {})


def write_tuned(
    tuned: Sequence[Tuned],
    points: Sequence[Point],
    kind: str,
    shape: BackboneShape,
    model: str,
    how: Search,
    folder: Path,
) -> dict[str, Any]:
    """Write tune.json, tune.png, tune.svg and a policy file per budget to `folder`; return what tune.json holds."""
    told: dict[str, Any] = to_json(tuned, points, kind, shape, how)
    write_text(folder / "tune.json", json.dumps(told, indent=2) + "\n")
    for one in tuned:
        write_text(folder / f"{file_of(one)}.yaml", policy_yaml(one, shape, model, how))
    draw(tuned, [point.trial for point in points], kind, [folder / "tune.png", folder / "tune.svg"])
    return told

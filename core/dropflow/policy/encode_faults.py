"""Refuses what cannot run where another program runs the model, and shows only what its vision tower gave."""

from __future__ import annotations

from typing import Any

from dropflow.lifecycle.stage import Stage
from dropflow.policy.plan import Plan
from dropflow.policy.schedule import encoded

IN_LLM = {
    "inject": "decides at which layer vision enters the LLM",
    "exit": "decides at which layer vision leaves the LLM",
    "decode_cache": "edits the KV cache",
}
REMEDY = "run this policy on transformers, or use stages that encode alone"


def encode_faults(plan: Plan, facts: frozenset[str], host: str) -> list[str]:
    """One line for each reason why `host`, on a backbone with these `facts`, cannot run the stages of a policy."""
    faults: list[str] = []
    for name, stage in plan.stages:
        faults += _faults_in_llm(plan, name, stage, host) or _faults_in_encode(plan, name, stage, facts, host)
    if not faults and encoded(16, plan.encodes, (4, 4))[0] is None:
        faults.append(
            "stages: together, how many tokens these leave of an image depends on what it shows, but "
            f"{host} counts placeholders before it has seen the image; let one stage alone reduce it, or pool first"
        )
    return faults


def _faults_in_llm(plan: Plan, name: str, stage: Stage[Any], host: str) -> list[str]:
    """Reasons against what a stage does in the LLM."""
    faults: list[str] = []
    keeps = plan.forecasts[name].keeps
    budgets = [keeps.get(b) for b, asked in plan.prune_at.items() if any(one is stage for _, one in asked)]
    if stage.differentiable or any(budget is None or (budget.share or 0) < 1 for budget in budgets):
        faults.append(
            f"stages.{name}: drops tokens at layers of the LLM, but in {host} all layers have the same ones; {REMEDY}"
        )
    for hook, what in IN_LLM.items():
        if any(one is stage for _, one in plan.hooks.implementers(hook)):
            faults.append(f"stages.{name}: {what}, which {host} leaves to nobody; {REMEDY}")
    return faults


def _faults_in_encode(plan: Plan, name: str, stage: Stage[Any], facts: frozenset[str], host: str) -> list[str]:
    """Reasons against what a stage does on the vision side, and against what it reads."""
    faults: list[str] = []
    places = [place for place, asked in plan.encode_at.items() if any(one is stage for _, one in asked)]
    inside = [place for place in places if place not in ("features", None)]
    if inside:
        where = "on pixels" if inside[0] == "pixels" else f"at boundary {inside[0]} of the vision tower"
        faults.append(f"stages.{name}: works {where}, inside what {host} runs as a whole; {REMEDY}")
    if "features" in places and "projector" not in facts:
        faults.append(
            f"stages.{name}: works on what the projector gets, but this model in {host} has no such place; write "
            "`at: output`, or choose a stage that works on the output"
        )
    if stage.vision_taps or "vision_attention" in stage.needs:
        faults.append(
            f"stages.{name}: reads the attention of the vision tower, which {host} does not give away; choose a stage "
            "that reads embeddings alone"
        )
    lacking = sorted(stage.needs - facts - {"vision_attention"})
    if lacking:
        faults.append(f"stages.{name}: needs {', '.join(lacking)}, which {host} does not show; {REMEDY}")
    if stage.reads_questions:
        faults.append(f"stages.{name}: reads the question, but {host} encodes an image once for all prompts; {REMEDY}")
    if stage.reads_videos:
        faults.append(f"stages.{name}: works on videos, but {host} reduces pictures alone; {REMEDY}")
    if type(stage).build_module is not Stage.build_module:
        faults.append(f"stages.{name}: has a trained module, whose weights {host} does not load; {REMEDY}")
    if type(stage).prepare is not Stage.prepare:
        faults.append(
            f"stages.{name}: prepares itself from a model of transformers, which {host} does not run; {REMEDY}"
        )
    forecast = plan.forecasts[name]
    if places and forecast.encoded == "data" and forecast.by_grid is None and not stage.reads_videos:
        faults.append(
            f"stages.{name}: leaves as many tokens as the content of an image decides, but {host} counts placeholders "
            "before it has seen the image; choose a stage with a fixed number or share"
        )
    return faults

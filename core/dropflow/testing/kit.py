"""The conformance kit: checks a stage on every family, or an adapter under every kind of policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dropflow.backbone.backbone import Backbone
from dropflow.errors import PolicyError, UnsupportedModel, nearest, quoted
from dropflow.lifecycle.questions import question_of_every_sample
from dropflow.lifecycle.stage import Stage
from dropflow.lifecycle.videos import every_image_a_video
from dropflow.policy import registry
from dropflow.policy.policy_file import load_policy
from dropflow.testing.asking_again import check_asking_again
from dropflow.testing.beside import check_beside, check_needs
from dropflow.testing.case import BrokenGuarantee, Case
from dropflow.testing.facts import check_facts, check_projections, check_vision
from dropflow.testing.families import tiny_models
from dropflow.testing.families.tiny import SAMPLES, Part, Tiny
from dropflow.testing.guarantees import CHECKS, check_inference, check_prefill, evicts_while_decoding
from dropflow.testing.overlapped import check_overlap
from dropflow.testing.probes import INSIDE, RAGGED, UNITS, WINDOW
from dropflow.testing.reading import check_reader
from dropflow.testing.recalled import check_recall
from dropflow.testing.static_steps import check_compiled_steps
from dropflow.testing.trained import check_trained
from dropflow.testing.units import check_units

VIDEO_SAMPLES: Sequence[Sequence[Part]] = ((3, "V", 5), (1, "I", 2, "V", 6), (4,))
"""Samples with a video, with an image and a video, and with neither."""
UNMIXED_SAMPLES: Sequence[Sequence[Part]] = ((3, "V", 5), (1, "V", 2, "V", 6), (4,))
"""Samples with one video, two videos, and none, for families whose calls bring images or videos."""
UNCOMPARED = "generated tokens not compared: what it evicts while decoding depends on them"
"""Detail of a cell whose decode steps cannot be described by a single mask."""


@dataclass(frozen=True)
class Cell:
    """The outcome of one stage on one adapter."""

    stage: str
    """Name of the stage."""
    adapter: str
    """Name of the family."""
    outcome: Literal["run", "refused", "failed"]
    """Whether all guarantees held, the family refused the stage, or a guarantee broke."""
    detail: str = ""
    """Why the stage was refused, what broke, or what could not be compared."""
    error: float = 0.0
    """Largest relative error against the oracle's run."""
    oracle: str = ""
    """Which oracle it was compared with, `masked` or `absent`; "" where nothing ran."""


Compared = Literal["everything", "answers", "prompts"]
"""How much of a cell is checked."""


def run_cell(
    stage: str,
    entry: Mapping[str, Any],
    adapter: str,
    family: type[Backbone],
    tiny: Tiny,
    *,
    compared: Compared = "everything",
    models: dict[str, Any] | None = None,
) -> Cell:
    """Check all guarantees for a policy of one stage (`entry`, with its options) on one family.

    `compared` is `everything` (also between an `encode` stage and a `prune` stage, and without facts the stage does not
    list), `answers` (only that prefill and decoding equal those of the oracle) or `prompts` (only prefill). Stages that
    read questions are told one. Stages that work on videos get prompts with videos; where the adapter knows of none,
    every image is a video of one frame. Cells that are given the same `models` build the family's models once.
    """
    name = f"{stage} x {adapter}"
    built = {} if models is None else models
    case = Case(name, family, tiny, {"name": "conformance", "stages": {"stage": entry}}, models=built)
    try:
        load_policy(case.policy)
    except PolicyError as fault:
        return Cell(stage, adapter, "failed", f"{name}: options of the stage: {fault}; see its `example`")
    try:
        with case.attach() as flow:
            note = UNCOMPARED if evicts_while_decoding(flow) else ""
            reads_videos = any(own.reads_videos for _, own in flow.plan.stages)
    except (PolicyError, UnsupportedModel) as refusal:
        return Cell(stage, adapter, "refused", str(refusal))
    told: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if reads_videos and "video" in tiny.pictures and not family.unstated_videos:
        case = case.with_samples(VIDEO_SAMPLES if tiny.mixes else UNMIXED_SAMPLES)
    elif reads_videos:
        told = every_image_a_video()
    try:
        with question_of_every_sample("What is in the picture?"), told:
            worst = COMPARISONS[compared](case)
    except BrokenGuarantee as broken:
        return Cell(stage, adapter, "failed", str(broken))
    return Cell(stage, adapter, "run", note, worst, case.oracle.name)


def _error(case: Case) -> float:
    """The largest relative error of all checks."""
    worst = max(check(case) for check in CHECKS.values())
    check_needs(case)
    check_trained(case)
    return max(worst, check_asking_again(case), check_recall(case), check_beside(case))


COMPARISONS: Mapping[Compared, Callable[[Case], float]] = {
    "everything": _error,
    "answers": check_inference,
    "prompts": check_prefill,
}
"""How much of a cell is checked -> its check, which returns the largest relative error."""


def stage_entry(stage: str | type[Stage[Any]], options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """Name of a stage and a policy entry for it, with `options` or else with the stage's `example`."""
    kind: type[Stage[Any]] = registry.load(registry.STAGES, stage) if isinstance(stage, str) else stage
    if not (isinstance(kind, type) and issubclass(kind, Stage)):
        raise BrokenGuarantee(f"{quoted(kind)}: expected the name of a stage or a subclass of `dropflow.Stage`")
    name = stage if isinstance(stage, str) else stage.__name__
    return name, {"use": stage, **(kind.example if options is None else options)}


def assert_stage_conforms(
    stage: str | type[Stage[Any]],
    options: Mapping[str, Any] | None = None,
    models: Mapping[str, tuple[type[Backbone], Tiny]] | None = None,
) -> list[Cell]:
    """Check the five guarantees for a stage on every family (`models`, by default `tiny_models()`).

    The stage runs alone, and between an `encode` stage and a `prune` stage. Its forecast is compared with what it does,
    and its `needs` with the facts it cannot do without.
    `options` are those of the stage, by default its `example`. Families that lack a fact the stage needs refuse it;
    the returned cells say so. Raises `BrokenGuarantee` listing every failure, or if every family refused the stage.
    """
    name, entry = stage_entry(stage, options)
    families = tiny_models() if models is None else models
    cells = [run_cell(name, entry, adapter, family, tiny) for adapter, (family, tiny) in families.items()]
    failed = [cell.detail for cell in cells if cell.outcome == "failed"]
    if failed:
        raise BrokenGuarantee("\n".join(failed))
    if all(cell.outcome == "refused" for cell in cells):
        raise BrokenGuarantee(f"{name}: every family refused it, so nothing was checked: {cells[0].detail}")
    return cells


def assert_backbone_conforms(
    adapter: str | type[Backbone],
    tiny: Tiny | None = None,
    *,
    attention: str = "sdpa",
    side: str = "left",
    compiled: bool = False,
    thorough: bool = True,
) -> float:
    """Check the facts an adapter states and the five guarantees with it; return the largest relative error.

    `tiny` is the family in miniature, by default that of `tiny_models()` under the adapter's name. Prompts contain
    images and, if the family has them, videos; tokens enter late, are ranked, dropped from the features, protected, and
    exit early. Where the adapter says that it is possible, images are also encoded beside the layers before they enter.
    With `compiled`, decode steps are also compiled as one graph, on a static cache, which takes some seconds.
    Without `thorough`, guarantees 1 and 3 to 5, training and the absent oracle are left out for policies that drop rows
    of the features and for prompts with videos, and images encoded beside the layers are only compared bit by bit with
    those encoded first.
    Raises `BrokenGuarantee` for the first fact or guarantee that does not hold.
    """
    family: type[Backbone] = registry.load(registry.ADAPTERS, adapter) if isinstance(adapter, str) else adapter
    name = adapter if isinstance(adapter, str) else adapter.__name__
    if tiny is None:
        known = tiny_models()
        if name not in known:
            raise BrokenGuarantee(f"{name}: pass `tiny`, the family in miniature; {nearest(name, known)}")
        tiny = known[name][1]
    videos = VIDEO_SAMPLES if tiny.mixes else UNMIXED_SAMPLES
    batches = {"images": SAMPLES, **({"videos": videos} if "video" in tiny.pictures else {})}
    whole, worst = Case(name, family, tiny, WINDOW, attention, side), 0.0
    for told, samples in batches.items():
        case = replace(whole, name=f"{name} ({told})", samples=samples)
        check_facts(case)
        check_vision(case)
        check_reader(case)
        check_projections(case)
    kinds, facts = {"window": WINDOW, "ragged": RAGGED}, family(whole.model).facts()
    if "vision_layers" in facts:
        kinds["inside the encoder"] = INSIDE
    if "units" in facts:
        kinds["units"] = UNITS
        units = replace(whole, name=f"{name} (units)", policy=UNITS)
        worst = max(check_units(replace(units, samples=samples)) for samples in batches.values())
    for kind, policy in kinds.items():
        for told, samples in batches.items():
            case = replace(whole, name=f"{name} ({told}, {kind} policy)", policy=policy, samples=samples)
            if thorough or (policy is WINDOW and told == "images"):
                worst = max(worst, *(check(case) for check in CHECKS.values()))
                worst = max(worst, check_prefill(replace(case, absent=True)))
            else:
                worst = max(worst, check_inference(case))
            if compiled:
                check_compiled_steps(case)
            if policy is WINDOW:
                worst = max(worst, check_overlap(case, thorough=thorough))
    return worst

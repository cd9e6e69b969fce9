"""The contract: the conformance kit over every stage x every adapter, and over families nobody wrote an adapter for."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import transformers
from unseen import UNSEEN

from dropflow import Backbone, Stage
from dropflow.lifecycle.hooks import HOOKS
from dropflow.policy import registry
from dropflow.testing import (
    BrokenGuarantee,
    Cell,
    Tiny,
    assert_backbone_conforms,
    assert_stage_conforms,
    run_cell,
    stage_entry,
    tiny_models,
)
from dropflow.testing.case import Case
from dropflow.testing.facts import check_facts, check_vision
from dropflow.testing.guarantees import check_inference
from dropflow.testing.kit import Compared
from dropflow.testing.probes import WINDOW, EveryThird, KeepAll
from dropflow.testing.reading import check_reader
from dropflow_adapters.auto import Auto

FAMILIES: dict[str, tuple[type[Backbone], Tiny]] = tiny_models() | {f"auto:{n}": (Auto, t) for n, t in UNSEEN.items()}
WHOLE = frozenset({"gemma3n", "llava", "llava_next"})
"""Families that are checked under all kinds of stages as thoroughly as by the slow set."""
MORE = {"gemma3n": 37, "llava_next": 37, "qwen3_5": 19, "qwen3_vl": 14}
"""Families that are unlike LLaVA -> every how many stages is checked on them for everything, as on LLaVA.

Those that take longest under all kinds of stages are checked under more single ones instead.
"""
TWINS = ("glm4v", "glm4v_moe", "qwen3_5_moe", "qwen3_vl_moe")
"""Families whose adapter and tower are those of another one, with experts in the decoder or under another name.

All kinds of stages run on them in the slow set; at all times, their facts are checked, and the cells of the matrix.
"""
MODELS: dict[str, dict[str, Any]] = {adapter: {} for adapter in FAMILIES}
"""The models that the cells of a family share; those of the slow set are built for each cell."""
STAGES = registry.names(registry.STAGES)
ALONE = "all kinds of stages"
ASKED = ("encode_at", "taps", "vision_taps", "carries", "reads_videos", "build_module")
"""What else a stage says of the parts of a model that it works on."""


def home(stage: str) -> str:
    """A family that has every fact the stage needs: LLaVA, but for stages that need a packed tower."""
    return "qwen3_vl" if "units" in registry.load(registry.STAGES, stage).needs else "llava"


def compared(stage: str, adapter: str) -> Compared:
    """How much of a cell is checked at all times; the slow set checks everything.

    Everything on one family for every stage, and on the families in `MORE` for some stages; answers on one family of
    16, since those of every family are compared under all kinds of stages, too, and on every family for stages of the
    cache; else prompts.
    """
    number = STAGES.index(stage) + list(FAMILIES).index(adapter)
    if adapter == home(stage) or (adapter in MORE and number % MORE[adapter] == 0):
        return "everything"
    decodes = hasattr(registry.load(registry.STAGES, stage), "decode_cache")
    return "answers" if number % 16 == 0 or decodes else "prompts"


@cache
def facts_of(adapter: str) -> frozenset[str]:
    """The facts that a family states."""
    family, tiny = FAMILIES[adapter]
    return frozenset(family(tiny.build()).facts())


def kind_of(stage: str) -> tuple[Any, ...]:
    """What a family can tell of a stage: its hooks, the facts that it needs, and whether it states each of `ASKED`."""
    kind = registry.load(registry.STAGES, stage)
    stated = [name for name in ASKED if getattr(kind, name) is not getattr(Stage, name)]
    return (*(hook for hook in HOOKS if hasattr(kind, hook)), *sorted(kind.needs), *stated)


def covering() -> list[tuple[str, str]]:
    """The cells that are checked at all times: every family under every kind of stage.

    Stages of one kind take the same way through an adapter and the layers of a model. So a family runs every third
    stage of a kind, or at least one, and families take turns: every stage runs on at least a third of them. Cells of
    which more than prompts is compared are always checked. The slow set has every stage on every family.
    """
    kinds: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for stage in STAGES:
        kinds[kind_of(stage)].append(stage)
    turns = {stage: (turn, min(3, len(alike))) for alike in kinds.values() for turn, stage in enumerate(alike)}
    return [
        (stage, adapter)
        for stage, (turn, period) in turns.items()
        for number, adapter in enumerate(FAMILIES)
        if (turn + number) % period == 0 or compared(stage, adapter) != "prompts"
    ]


def cell_of(stage: str, entry: dict[str, Any], adapter: str, how: Compared) -> Cell:
    """A cell on the model of its family, which is not used again if a guarantee does not hold on it."""
    cell = run_cell(stage, entry, adapter, *FAMILIES[adapter], compared=how, models=MODELS[adapter])
    if cell.outcome == "failed":
        MODELS[adapter].clear()
    return cell


@pytest.mark.parametrize(("stage", "adapter"), covering())
def test_every_kind_of_stage_keeps_the_guarantees_on_every_family(stage: str, adapter: str, cells: list[Cell]) -> None:
    cell = cell_of(*stage_entry(stage), adapter, compared(stage, adapter))
    cells.append(cell)
    assert cell.outcome != "failed", cell.detail
    assert cell.outcome == "run" or (cell.detail and adapter != home(stage))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_keeps_them_all_on_every_family(stage: str, adapter: str, cells: list[Cell]) -> None:
    cell = run_cell(*stage_entry(stage), adapter, *FAMILIES[adapter])
    cells.append(cell)
    assert cell.outcome != "failed", cell.detail


@pytest.mark.parametrize("adapter", FAMILIES)
@pytest.mark.parametrize("place", ["pixels", 1])
def test_units_left_out_of_the_tower_keep_the_guarantees(place: str | int, adapter: str, cells: list[Cell]) -> None:
    facts = facts_of(adapter)
    entry = {"use": "control/random", "encode": 0.5, "place": place}
    packed: Compared = "everything" if adapter in ("qwen2_5_vl", "qwen3_vl") else "answers"
    cell = cell_of(f"control/random on {place}", entry, adapter, packed if "units" in facts else "prompts")
    cells.append(cell)
    assert cell.outcome == ("run" if "units" in facts or (place == 1 and "vision_layers" in facts) else "refused")
    assert ("units" in facts) == adapter.startswith("qwen")


@pytest.mark.parametrize("adapter", [pytest.param(n, marks=pytest.mark.slow) if n in TWINS else n for n in FAMILIES])
def test_every_adapter_keeps_the_guarantees_under_all_kinds_of_stages(adapter: str, cells: list[Cell]) -> None:
    family, tiny = FAMILIES[adapter]
    try:
        error = assert_backbone_conforms(family, tiny, thorough=adapter in WHOLE)
    except BrokenGuarantee as broken:
        cells.append(Cell(ALONE, adapter, "failed", str(broken)))
        raise
    cells.append(Cell(ALONE, adapter, "run", error=error))


@pytest.mark.parametrize("adapter", TWINS)
def test_a_twin_has_the_adapter_of_another_family_whose_facts_are_right(adapter: str) -> None:
    family, tiny = FAMILIES[adapter]
    assert family in {kind for name, (kind, _) in FAMILIES.items() if name not in TWINS}
    case = Case(adapter, family, tiny, WINDOW)
    check_facts(case)
    check_vision(case)
    check_reader(case)
    assert check_inference(case) < tiny.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("adapter", FAMILIES)
def test_with_either_attention_and_padding_on_either_side(adapter: str, side: str, attention: str) -> None:
    family, tiny = FAMILIES[adapter]
    assert assert_backbone_conforms(family, tiny, attention=attention, side=side) < 1e-5


def test_every_shipped_adapter_but_auto_has_a_tiny_model() -> None:
    lacking = {
        "lfm3_vl": not hasattr(transformers, "Lfm3VlConfig"),
        "llama4": transformers.__version__ == "5.24.0",  # it cannot read images
    }
    absent = {"auto", *(name for name, lacks in lacking.items() if lacks)}
    assert set(tiny_models()) == set(registry.names(registry.ADAPTERS)) - absent
    assert len(tiny_models()) >= 14


def test_a_stage_of_ones_own_runs_on_the_given_families() -> None:
    models = {name: FAMILIES[name] for name in ("llava", "qwen3_vl")}
    cells = assert_stage_conforms(EveryThird, models=models)
    assert [(cell.adapter, cell.outcome) for cell in cells] == [("llava", "run"), ("qwen3_vl", "run")]
    assert all(0 < cell.error < 1e-5 for cell in cells)


def test_a_stage_that_no_family_can_run_is_not_passed() -> None:
    class NeedsCls(KeepAll):
        needs = frozenset({"cls"})

    with pytest.raises(BrokenGuarantee, match=r"NeedsCls: every family refused it.*needs cls.*Qwen3VL cannot give"):
        assert_stage_conforms(NeedsCls, models={"qwen3_vl": FAMILIES["qwen3_vl"]})


def test_a_stage_without_usable_example_options_fails_instead_of_being_refused() -> None:
    with pytest.raises(BrokenGuarantee, match=r"early-exit x llava: options of the stage: .*at: field.*its `example`"):
        assert_stage_conforms("hidrop/early-exit", options={}, models={"llava": FAMILIES["llava"]})

"""The contract: the conformance kit over every stage x every adapter, and over families nobody wrote an adapter for."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from unseen import UNSEEN

from dropflow import Backbone
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
from dropflow.testing.kit import Compared
from dropflow.testing.probes import EveryThird, KeepAll
from dropflow_adapters.auto import Auto

FAMILIES: dict[str, tuple[type[Backbone], Tiny]] = tiny_models() | {f"auto:{n}": (Auto, t) for n, t in UNSEEN.items()}
WHOLE = frozenset({"gemma3n", "llava", "llava_next", "qwen3_5", "qwen3_vl"})
"""Families that are checked under all kinds of stages as thoroughly as by the slow set."""
MODELS: dict[str, dict[str, Any]] = {adapter: {} for adapter in FAMILIES}
"""The models that the cells of a family share; those of the slow set are built for each cell."""
STAGES = registry.names(registry.STAGES)
ALONE = "all kinds of stages"


def home(stage: str) -> str:
    """A family that has every fact the stage needs: LLaVA, but for stages that need a packed tower."""
    return "qwen3_vl" if "units" in registry.load(registry.STAGES, stage).needs else "llava"


def compared(stage: str, adapter: str) -> Compared:
    """How much of a cell is checked at all times; the slow set checks everything.

    Everything on one family for every stage, and on the families in `WHOLE` for one stage more each; answers on one
    family of eight, and on every family for stages of the cache; prompts on all.
    """
    number = STAGES.index(stage) + list(FAMILIES).index(adapter)
    if adapter == home(stage) or (adapter in WHOLE and number % len(STAGES) == 0):
        return "everything"
    return "answers" if number % 8 == 0 or hasattr(registry.load(registry.STAGES, stage), "decode_cache") else "prompts"


def cell_of(stage: str, entry: dict[str, Any], adapter: str, how: Compared) -> Cell:
    """A cell on the model of its family, which is not used again if a guarantee does not hold on it."""
    cell = run_cell(stage, entry, adapter, *FAMILIES[adapter], compared=how, models=MODELS[adapter])
    if cell.outcome == "failed":
        MODELS[adapter].clear()
    return cell


@pytest.mark.parametrize("adapter", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_keeps_the_guarantees_on_every_family(stage: str, adapter: str, cells: list[Cell]) -> None:
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
    family, tiny = FAMILIES[adapter]
    facts = family(tiny.build()).facts()
    entry = {"use": "control/random", "encode": 0.5, "place": place}
    packed: Compared = "everything" if adapter in ("qwen2_5_vl", "qwen3_vl") else "answers"
    cell = cell_of(f"control/random on {place}", entry, adapter, packed if "units" in facts else "prompts")
    cells.append(cell)
    assert cell.outcome == ("run" if "units" in facts or (place == 1 and "vision_layers" in facts) else "refused")
    assert ("units" in facts) == adapter.startswith("qwen")


@pytest.mark.parametrize("adapter", FAMILIES)
def test_every_adapter_keeps_the_guarantees_under_all_kinds_of_stages(adapter: str, cells: list[Cell]) -> None:
    family, tiny = FAMILIES[adapter]
    try:
        error = assert_backbone_conforms(family, tiny, thorough=adapter in WHOLE)
    except BrokenGuarantee as broken:
        cells.append(Cell(ALONE, adapter, "failed", str(broken)))
        raise
    cells.append(Cell(ALONE, adapter, "run", error=error))


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

"""Tools for authors of stages and adapters: the conformance kit, and the oracles that a pruned run must match."""

from dropflow.lifecycle.field_texts import show_field_texts
from dropflow.testing.case import BrokenGuarantee
from dropflow.testing.facts import check_facts
from dropflow.testing.families import tiny_models
from dropflow.testing.families.tiny import (
    END,
    IMAGE,
    START,
    TEXT,
    VIDEO,
    VISION,
    Picture,
    Tiny,
    pixels,
    square_pictures,
)
from dropflow.testing.guarantees import (
    check_batch_invariance,
    check_drop_is_mask,
    check_isolation,
    check_no_op,
    check_refusals,
)
from dropflow.testing.kit import Cell, assert_backbone_conforms, assert_stage_conforms, run_cell, stage_entry
from dropflow.testing.oracle import MaskedOracle
from dropflow.testing.oracle_absent import AbsentOracle
from dropflow.testing.reading import check_reader

__all__ = [
    "END",
    "IMAGE",
    "START",
    "TEXT",
    "VIDEO",
    "VISION",
    "AbsentOracle",
    "BrokenGuarantee",
    "Cell",
    "MaskedOracle",
    "Picture",
    "Tiny",
    "assert_backbone_conforms",
    "assert_stage_conforms",
    "check_batch_invariance",
    "check_drop_is_mask",
    "check_facts",
    "check_isolation",
    "check_no_op",
    "check_reader",
    "check_refusals",
    "pixels",
    "run_cell",
    "square_pictures",
    "stage_entry",
    "tiny_models",
]

for _name in __all__:
    show_field_texts(globals()[_name])

"""Every type of multimodal model in transformers, in miniature: the page of model types says what it does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from documents import ROOT
from miniatures import model_of, tiny

import dropflow
from dropflow import Backbone, backbone_for
from dropflow.errors import DropflowError
from dropflow.testing import assert_backbone_conforms, check_facts, tiny_models
from dropflow.testing.case import Case
from dropflow.testing.guarantees import check_prefill
from dropflow.testing.probes import WINDOW
from dropflow_lab.backbones.listing import models, models_in_markdown
from dropflow_lab.backbones.miniature import kinds
from dropflow_lab.markdown import renew

OWN = set(tiny_models())
"""Types with a family of their own in the kit, on which the whole matrix of stages runs."""


UNLIKE: dict[str, tuple[str, str]] = {
    "fuyu": ("5.20", "its forward does not call `get_image_features`"),
    "hunyuan_vl": ("5.20", "it returns the features of all pictures as one entry"),
    "llama4": ("5.24", "its forward raises for images, with or without a policy"),
}
"""Type -> a minor version of transformers in which it cannot be tested, and why."""


@cache
def rows() -> dict[str, dict[str, Any]]:
    """The rows of the page by type."""
    return {row["name"]: row for row in models(model_of)}


@cache
def adapter_of(kind: str) -> type[Backbone]:
    return type(backbone_for(model_of(kind)))


def case(kind: str) -> Case:
    return Case(kind, adapter_of(kind), tiny(kind), WINDOW)


def skip_unlike(kind: str) -> None:
    version, why = UNLIKE.get(kind, ("", ""))
    if version and transformers.__version__.startswith(f"{version}."):
        pytest.skip(f"in transformers {transformers.__version__}, {why}")


def served() -> list[str]:
    """Types that have no family in the kit; whether they are served is for the test to say."""
    return sorted(set(kinds()) - OWN)


def test_no_type_is_unknown_and_most_are_served() -> None:
    assert sorted(rows()) == kinds()
    assert all(row["adapter"] for row in rows().values() if row["status"] == "served")
    assert all(row["reason"] for row in rows().values() if row["status"] != "served")
    assert sum(row["status"] == "served" for row in rows().values()) >= 60
    assert {name for name, row in rows().items() if row["status"] == "not built"} <= {"gemma3n"}


def test_types_with_an_adapter_of_their_own_name_it() -> None:
    built = {name for name in OWN & set(kinds()) if rows()[name]["status"] != "not built"}
    assert {name: rows()[name]["adapter"] for name in built} == {name: name for name in built}


def test_the_table_of_models_is_what_attach_says_of_every_type(tmp_path: Path) -> None:
    document = ROOT / "docs" / "backbones.md"
    if not document.exists():
        pytest.skip("the documents are not beside the tests")
    text = document.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" not in text:
        pytest.skip(f"the page lists the types of another version than transformers {transformers.__version__}")
    renewed = tmp_path / "backbones.md"
    renewed.write_text(text, encoding="utf-8")
    renew(renewed, "table of models", models_in_markdown([*rows().values()]))
    assert renewed.read_text(encoding="utf-8") == text, "renew it: dropflow list models --into docs/backbones.md"


@pytest.mark.parametrize("kind", served())
def test_a_type_does_what_the_page_says(kind: str) -> None:
    row = rows()[kind]
    skip_unlike(kind)
    if row["status"] == "not built":
        pytest.skip(row["reason"])
    if row["status"] == "refused":
        with pytest.raises(DropflowError):
            dropflow.attach(model_of(kind), WINDOW)
        return
    one = case(kind)
    check_facts(one)
    assert check_prefill(one) < one.tiny.tolerance
    assert sorted(adapter_of(kind)(one.model).facts()) == row["facts"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", served())
def test_a_served_type_keeps_the_guarantees(kind: str) -> None:
    row = rows()[kind]
    skip_unlike(kind)
    if row["status"] != "served":
        pytest.skip(row["reason"])
    assert_backbone_conforms(adapter_of(kind), tiny(kind))

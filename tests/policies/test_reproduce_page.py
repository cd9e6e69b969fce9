"""The page on published numbers names policies that are installed, and the tokens that they leave."""

from __future__ import annotations

import re

import pytest
from documents import ROOT

import dropflow
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape

PAGE = ROOT / "docs" / "reproduce.md"


def rows() -> list[tuple[str, str, str]]:
    """Policy, average tokens and tokens at entry, of the rows that state numbers."""
    found = re.findall(r"^\| `([\w.-]+)` \| (\d+) \| (\d+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(name, average, entry) for name, average, entry in found]


def test_the_page_states_what_the_policies_leave() -> None:
    if not PAGE.exists():
        pytest.skip("the documents are not beside the tests")
    assert len(rows()) == 3
    for name, average, entry in rows():
        tokens = resolve(dropflow.load_policy(name), BackboneShape(32, 576)).schedule()
        assert (round(tokens.average or 0, 6), tokens.entry) == (int(average), int(entry)), name


def test_every_policy_of_its_commands_is_installed() -> None:
    named = re.findall(r"policy=([\w.-]+)", PAGE.read_text(encoding="utf-8"))
    for name in set(named) - {"none"}:
        assert dropflow.load_policy(name).tuned_for == dropflow.load_policy("hidrop-64").tuned_for

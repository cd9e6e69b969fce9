"""`dropflow schema`: what editors check policy files with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from dropflow.policy.policy import schema as policy_schema
from dropflow.policy.registry import policy_files


def _data(path: Path) -> Any:
    """A policy as an editor sees it: JSON knows no keys but strings."""
    return json.loads(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8"))))


@pytest.fixture(scope="module")
def validator(cli) -> Draft202012Validator:
    schema = json.loads(cli("schema").stdout)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_it_is_the_schema_that_shipped_policies_fit(cli) -> None:
    """As `tests/core/policy/test_policy.py` checks."""
    assert json.loads(cli("schema").stdout) == json.loads(json.dumps(policy_schema()))


@pytest.mark.parametrize(
    ("stage", "option", "value"),
    [("inject", "att", 8), ("pyramid", "selects", "exact"), ("pyramid", "select", "exactly"), ("exit", "at", -1)],
)
def test_wrong_options_are_not(validator, stage, option, value) -> None:
    data = _data(policy_files()["hidrop-64"])
    data["stages"][stage][option] = value
    assert not validator.is_valid(data)


def test_written_to_a_file(cli, tmp_path) -> None:
    out = tmp_path / "new" / "policy.schema.json"
    result = cli("schema", "--out", out, "--json")
    assert json.loads(result.stdout) == {"out": str(out)}
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(cli("schema", "--json").stdout)


def test_a_file_that_cannot_be_written(refused, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert "file: " in refused("schema", "--out", tmp_path / "file" / "schema.json")

"""`dropflow check`: what is valid, and the one line that says what is not."""

from __future__ import annotations

import json

import pytest

TUNED = "tuned_for: {layers: 32, visual_tokens: 576}\n"


def test_a_shipped_policy_is_resolved_for_the_shape_it_is_tuned_for(cli) -> None:
    assert json.loads(cli("check", "hidrop-64", "--json").stdout) == {
        "policy": "hidrop-64",
        "valid": True,
        "stages": {
            "inject": "hidrop/late-injection",
            "pyramid": "hidrop/concave-pyramid",
            "exit": "hidrop/early-exit",
        },
        "resolved_for": {"layers": 32, "visual_tokens": 576},
    }
    assert cli("check", "hidrop-64").stdout == "hidrop-64: valid, resolved for 32 layers and 576 visual tokens\n"


def test_without_a_shape_a_policy_is_validated_only(cli, tmp_path) -> None:
    policy = tmp_path / "half.yaml"
    policy.write_text("stages: {exit: {use: hidrop/early-exit, at: 99}}\n")
    assert json.loads(cli("check", policy, "--json").stdout)["resolved_for"] is None
    assert "half: valid, not resolved" in cli("check", policy).stdout


def test_a_depth_alone_is_enough_to_resolve(cli, tmp_path) -> None:
    policy = tmp_path / "half.yaml"
    policy.write_text("stages: {exit: {use: hidrop/early-exit, at: 0.5}}\n")
    checked = json.loads(cli("check", policy, "--layers", 12, "--json").stdout)
    assert checked["resolved_for"] == {"layers": 12, "visual_tokens": None}


def test_visual_tokens_alone_are_not(refused, tmp_path) -> None:
    policy = tmp_path / "half.yaml"
    policy.write_text("stages: {exit: {use: hidrop/early-exit, at: 0.5}}\n")
    assert "--layers" in refused("check", policy, "--visual-tokens", 576)


@pytest.mark.parametrize("policy", ["hidrop-65", "no/such/file.yaml"])
def test_unknown_policies(refused, policy) -> None:
    assert policy in refused("check", policy)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stages: {exit: {use: hidrop/early-exits, at: 24}}\n", "hidrop/early-exit"),
        (TUNED + "stages: {exit: {use: hidrop/early-exit, at: 33}}\n", "stages.exit.at"),
        (TUNED + "stages: {p: {use: hidrop/concave-pyramid, keep: {8: 10, 16: 20}}}\n", "stages.p.keep.16"),
        ("stages: {p: {use: hidrop/concave-pyramid, keeps: {8: 10}, keep: {8: 1}}}\n", "stages.p.keeps"),
        ("stages: !!python/object:os.system {}\n", "not plain YAML"),
        ("just a sentence\n", "expected a mapping"),
    ],
    ids=["unknown stage", "beyond the depth", "growing keeps", "misspelt option", "python object", "no mapping"],
)
def test_faults_in_a_file(refused, tmp_path, text, expected) -> None:
    policy = tmp_path / "faulty.yaml"
    policy.write_text(text)
    assert expected in refused("check", policy)


def test_another_shape_without_rescale(cli, refused) -> None:
    shape = ("--layers", 32, "--visual-tokens", 144)
    assert "rescale: true" in refused("check", "hidrop-64", *shape, "--set", "stages.pyramid.keep={10: 215}")
    assert cli("check", "hidrop-64", *shape, "--set", "rescale=true").exit_code == 0


def test_several_faults_are_reported_together_a_line_each(cli, tmp_path) -> None:
    policy = tmp_path / "faulty.yaml"
    policy.write_text("stages:\n  a: {use: nothing}\n  b: {use: hidrop/early-exit, att: 3}\n")
    result = cli("check", policy)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["stages.a.use", "stages.b.at", "stages.b.att"]

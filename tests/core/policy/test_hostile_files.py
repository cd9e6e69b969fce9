"""Policies that nobody meant: one line each, nothing run, nothing read but the policy."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import dropflow
from dropflow.errors import PolicyError, escaped, quoted

STAGES = "stages: {p: {use: hidrop/concave-pyramid, keep: {2: 5}}}\n"
LAUGHS = "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGED_LAUGHS = "".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))
REFERRED_LAUGHS = "".join(f"a{n}: ['${{a{n - 1}}}', '${{a{n - 1}}}']\n" for n in range(1, 30))
LONG = "x" * 5000


def refusal(source: Any, *overrides: str) -> str:
    """The message, whose lines are short and printable."""
    with pytest.raises(PolicyError) as caught:
        dropflow.load_policy(source, overrides)
    lines = str(caught.value).split("\n")
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    assert len(lines) <= 21
    return lines[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a [*a]\n", "or one that contains itself"),
        ("stages: &s {p: *s}\n", "or one that contains itself"),
        ("a: " + "[" * 1000 + "]" * 1000, "more than 32 levels"),
        ("".join(" " * n + "a:\n" for n in range(40)), "more than 32 levels"),
        ("a0: &a0 [x, x]\n" + LAUGHS, "more than 2,000 entries"),
        ("a0: &a0 {x: 1}\n" + MERGED_LAUGHS, "more than 2,000 entries"),
        ("a0: 1\n" + REFERRED_LAUGHS + STAGES, "its references expand to more than 2,000 entries"),
        ("{null: 1}", "expected text or a number as a key, got None"),
        (
            "stages: {p: {use: hidrop/concave-pyramid, keep: {null: 5}}}",
            "stages.p.keep: expected text or a number",
        ),
        ("stages: {p: {use: hidrop/concave-pyramid, keep: {3: 5, '3': 6}}}", "'3' appears twice, as text and as a"),
        ("name: !!int abc\n" + STAGES, "line 1: 'abc' is not a number"),
        ("a: !!float ''\n", "is not a number"),
        ("rescale: !!bool abc\n", "is not true or false"),
        ("a: !!binary x\n", "could not determine a constructor"),
        ("!!map x\n", "expected a mapping node"),
        ("!!seq x: 1\n", "a key that is not text or a number"),
        (f"stages: {{e: {{use: hidrop/early-exit, at: {'9' * 5000}}}}}", "is not a number"),
        (f"stages: {{e: {{use: hidrop/early-exit, at: 0x{'9' * 5000}}}}}", "got an integer of 20,000 bits"),
        ("stages: {e: {use: hidrop/early-exit, at: 010}}", "'010' is a number to the base 8 or 60 in YAML"),
        ("stages: {e: {use: hidrop/early-exit, at: 1:30}}", "'1:30' is a number to the base 8 or 60 in YAML"),
        ("stages: {e: {use: hidrop/early-exit, at: .nan}}", "stages.e.at: expected a number from -2,147,483,647 to"),
        (f"name: {LONG}\n{STAGES}", "name: expected a plain name: up to 100 letters, digits"),
        (f"stages: {{e: {{use: {LONG}}}}}", "stages.e.use: no stage named 'xxx"),
        (f"? {LONG}\n: 1\n", "expected keys of 1 to 100 characters, got 'xxx"),
        ('"\\e[31m": 1\n', r"expected text or a number as a key, got '\x1b[31m'"),
        ('name: "a\\nerror: b"\n' + STAGES, r"got 'a\nerror: b'"),
        ('description: "\\ud800"\n' + STAGES, "description: expected text without control characters"),
        ("name: \0\n", "a character that YAML does not allow"),
        ("description: " + "x " * 6000, "description: expected at most 10,000 characters"),
        ("# " + "x" * 40_000, "it has more than 32,768 bytes"),
        ('"[key]": 1\n' + STAGES, "[key]: unknown option"),
        ("just words", "expected a mapping with `stages`, got text"),
        ("", "expected a mapping with `stages`, got nothing"),
    ],
    ids=str,
)
def test_a_faulty_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_bytes(text.encode())
    assert expected in refusal(file)


def test_a_date_is_text(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("name: 2026-13-45\ndescription: 2026-11-29\n" + STAGES)
    assert dropflow.load_policy(file).name == "2026-13-45"
    assert dropflow.load_policy(file).description == "2026-11-29"


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("description: ${", "expected `${path.of.an.entry}` of this policy, got '${'"),
        ("description: ${nowhere}", "description: no entry 'nowhere' in this policy; valid: description, name, stages"),
        ("description: ${description}", "description: the reference 'description' leads back to itself"),
        ("description: a ${tuned_for}\ntuned_for: '${description}'", "leads back to itself"),
        ("description: of ${stages}", "description: stages is not text or a number to put into a text"),
        ("description: ${oc.env:DROPFLOW_SECRET}", "got '${oc.env:DROPFLOW_SECRET}'; nothing else is interpolated"),
        ("description: ${oc.decode:1}", "nothing else is interpolated"),
        ("description: ${a.${b}}", "nothing else is interpolated"),
    ],
)
def test_references_reach_into_the_policy_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str, expected: str
) -> None:
    monkeypatch.setenv("DROPFLOW_SECRET", "hunter2")
    file = tmp_path / "p.yaml"
    file.write_text(f"{stated}\n{STAGES}")
    assert expected in refusal(file)
    override = stated.split("\n")[0].replace(": ", "=")
    assert "hunter2" not in refusal({"name": "x", "stages": {"e": {"use": "hidrop/early-exit"}}}, override)


def test_a_chain_of_references_ends() -> None:
    chain = {f"a{n}": f"${{a{n + 1}}}" for n in range(1000)}
    assert "ends a chain of more than 32 references" in refusal({**chain, "a1000": 1, "stages": {}})


def test_a_reference_is_the_entry_itself_or_written_into_a_text() -> None:
    stages = {"e": {"use": "hidrop/early-exit", "at": 0.5}, "f": {"use": "vtw/withdrawal", "at": "${stages.e.at}"}}
    policy = dropflow.load_policy({"name": "x", "description": "exit at ${stages.f.at}", "stages": stages})
    assert policy.description == "exit at 0.5"
    assert policy.stages["f"].options.model_dump()["at"] == 0.5


@pytest.mark.parametrize("name", ["..", ".", "../x", "a b", "a/b", "a\nb", "", "ä", "x" * 101])
def test_names_are_plain(name: str) -> None:
    stage = {"use": "hidrop/early-exit", "at": 3}
    assert refusal({"name": name, "stages": {"e": stage}}).startswith("name: expected a plain name")
    assert refusal({"name": "x", "stages": {name: stage}}).startswith(
        "stages: expected keys of 1" if name in {"", "x" * 101} else f"stages.{escaped(name)}".rstrip(".")
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/etc/passwd", "/etc/passwd: expected the path of a policy file, ending in .yaml or .yml"),
        ("~nouser/x.yaml", "~nouser/x.yaml: not a valid file path"),
        (LONG, "no such policy"),
        (LONG + ".yaml", "not a valid file path"),
        ("a\0.yaml", r"a\x00.yaml: not a valid file path"),
        ("a\nerror: b", r"a\nerror: b: no such policy"),
        ("", "policy: expected a name, a path, a mapping or a Policy, got ''"),
    ],
)
def test_what_is_no_path_of_a_policy(source: str, expected: str) -> None:
    assert expected in refusal(source)
    if "\0" not in source and source:
        assert expected.partition(":")[2] in refusal({"extends": source})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, expected in (
        ("pipe", "it is not a regular file"),
        ("folder", "directory"),
        ("device", "it is not a regular file"),
        ("loop", " file "),
        ("binary", "not UTF-8 text"),
    ):
        assert expected in refusal(tmp_path / f"{name}.yaml").replace("Is a directory", "directory")


def test_a_file_that_is_no_policy_is_not_quoted(tmp_path: Path) -> None:
    for secret in ("hunter2", "[hunter2]", "a: [hunter2", "hunter2: 'x", "- hunter2\n- {"):
        (tmp_path / "secret.yaml").write_text(secret)
        (tmp_path / "p.yaml").write_text("extends: secret.yaml\n")
        assert "hunter2" not in refusal(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "",
        "a",
        "=",
        "stages.exit.at=!!int x",
        "stages.exit.at=" + "9" * 5000,
        "stages.exit.at=&a [*a]",
        "stages.exit.at=010",
        "stages.pyramid.keep.012=5",
        LONG + "=1",
        "stages." + "x." * 3000 + "=1",
        "\x1b[31m\n=1",
        "stages.pyramid.keep.[=1",
        "name=../../x",
        "stages.exit.at=.inf",
    ],
)
def test_overrides_are_held_to_the_same(override: str) -> None:
    assert refusal("hidrop-64", override)


def test_mappings_from_python_are_held_to_the_same() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    exit_at = {"use": "hidrop/early-exit"}
    for mapping, expected in (
        (endless, "or one that contains itself"),
        ({"stages": {"a": {**exit_at, "at": 10**6000}}}, "got an integer of 19,932 bits"),
        ({"stages": {"a": {**exit_at, "at": 1e308}}}, "expected a number from"),
        ({"stages": {"a": {"use": "dart/duplication", "text_pivots": "9" * 40}}}, "stages.a.text_pivots: "),
        ({"stages": {"a": {"use": "cdpruner/conditional-dpp", "keep": 3, "theta": "nan"}}}, "finite number"),
        ({(1, 2): 1}, "expected text or a number as a key, got (1, 2)"),
        ({True: 1}, "expected text or a number as a key, got True"),
        ({"name": b"x" * 10_000, "stages": {}}, "name: "),
    ):
        assert expected in refusal(mapping)


def test_many_faults_are_counted() -> None:
    with pytest.raises(PolicyError) as caught:
        dropflow.load_policy({"stages": {f"s{n}": {"use": "none/such"} for n in range(500)}})
    lines = str(caught.value).split("\n")
    assert (len(lines), lines[-1]) == (21, "and 480 more")


def test_quoting_is_one_short_line() -> None:
    assert quoted("a\nb\x1b") == r"'a\nb\x1b'"
    assert quoted({"a": 10**5000}) == "{'a': an integer of 16,610 bits}"
    assert len(quoted([["x" * 1000] * 1000] * 1000)) <= 200
    assert escaped("x" * 5000).endswith("... (5,000 characters)")


def test_a_faulty_policy_is_refused_without_torch(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "p.yaml").write_text("name: ../x\nstages: {e: {use: hidrop/early-exits, at: 3}}\n")
    program = (
        "import sys\nfrom dropflow_lab.console.cli import app\n"
        "try:\n    app(['check', 'p.yaml'])\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False False\n"
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == ["name", "stages.e.use"]

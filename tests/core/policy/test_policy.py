"""Reading policies: inheritance, overrides, rescaling, registry and schema."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tiny import HIDROP

import dropflow
from dropflow.errors import BrokenPlugin, DuplicateName, PolicyError, UnknownName
from dropflow.policy import registry
from dropflow.policy.expected import expected
from dropflow.policy.plan import resolve
from dropflow.policy.policy import schema
from dropflow.units import BackboneShape

LLAVA = BackboneShape(32, 576)


def per_layer(policy: Any, shape: BackboneShape = LLAVA) -> tuple[int | None, ...]:
    return resolve(dropflow.load_policy(policy), shape).schedule().per_layer


def test_a_file_inherits_merges_and_takes_away(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("extends: hidrop-64\nstages: {pyramid: {keep: {10: 343, 18: null}}}\n")
    child = tmp_path / "sub" / "child.yaml"
    child.parent.mkdir()
    child.write_text("extends: ../base.yaml\nstages:\n  exit: null\n  inject: {at: 9}\n")
    policy = dropflow.load_policy(child)
    assert policy.name == "child"
    assert list(policy.stages) == ["inject", "pyramid"]
    assert policy.stages["pyramid"].options.model_dump()["keep"] == {10: 343, 14: 10, 16: 5}
    assert per_layer(policy) == (0,) * 9 + (576,) + (343,) * 4 + (10,) * 2 + (5,) * 16
    loop = tmp_path / "loop.yaml"
    loop.write_text("extends: loop.yaml\nstages: {}\n")
    with pytest.raises(PolicyError, match="inherits from itself"):
        dropflow.load_policy(loop)
    with pytest.raises(PolicyError, match=r"no such policy file"):
        dropflow.load_policy(tmp_path / "none.yaml")


def test_a_file_that_is_no_policy_is_told_from_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yml.txt").touch()
    for given in ("mine.yml.txt", "."):
        with pytest.raises(PolicyError, match=r"a file or folder, but no policy: policy files end in \.yaml or \.yml"):
            dropflow.load_policy(given)


def test_a_key_said_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    stages = "stages:\n  e: {use: hidrop/early-exit, at: 3}\n"
    for text, key in (
        (stages + "  e: {use: hidrop/early-exit, at: 8}\n", "'e'"),
        ("stages: {p: {use: hidrop/concave-pyramid, keep: {10: 5, 10: 7}}}", "10"),
    ):
        path.write_text(text)
        with pytest.raises(PolicyError, match=f"the key {key} appears twice"):
            dropflow.load_policy(path)
    path.write_text("base: &base {use: hidrop/early-exit, at: 3}\nstages: {e: {<<: *base, at: 4}}\n")
    with pytest.raises(PolicyError, match=r"^base: unknown option"):  # merge keys pass
        dropflow.load_policy(path)


def test_overrides_name_a_path(tmp_path: Path) -> None:
    changed = dropflow.load_policy("hidrop-64", ["stages.pyramid.keep.10=343", "stages.exit.at=23", "name=mine"])
    assert changed.name == "mine"
    assert resolve(changed, LLAVA).schedule().average == pytest.approx((2 * 576 + 4 * 343 + 20 + 10 + 5) / 32)
    shares = tmp_path / "shares.yaml"
    shares.write_text("stages: {p: {use: hidrop/concave-pyramid, keep: {0.25: 0.5, 0.5: 4}}}\n")
    assert per_layer(dropflow.load_policy(shares, ["stages.p.keep.0.25=0.75"]), BackboneShape(8, 100)) == (
        100,
        100,
        75,
        75,
        4,
        4,
        4,
        4,
    )
    for override, message in (
        ("stages.pyramd.at=3", "nothing to override there; did you mean 'pyramid'"),
        ("stages.exit.at", "written path=value"),
        ("stages.exit.at=[1", "not plain YAML"),
        ("stages.exit.att=1", r"stages\.exit\.att: unknown option; did you mean 'at'"),
    ):
        with pytest.raises(PolicyError, match=message):
            dropflow.load_policy("hidrop-64", [override])


def test_a_policy_goes_to_plain_data_and_back() -> None:
    policy = dropflow.load_policy("hidrop-80")
    assert dropflow.load_policy(policy.to_dict()) == policy
    assert dropflow.load_policy(policy) is policy


def test_interpolations_are_resolved_and_their_faults_named(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("k: 3\nstages: {p: {use: hidrop/concave-pyramid, keep: {2: '${k}'}}}\n")
    with pytest.raises(PolicyError, match="k: unknown option"):
        dropflow.load_policy(file)
    file.write_text("stages: {p: {use: hidrop/concave-pyramid, keep: {2: 5, 3: '${stages.p.keep.2}'}}}\n")
    assert per_layer(file, BackboneShape(4, 9)) == (9, 9, 5, 5)
    file.write_text("stages: {p: {use: hidrop/concave-pyramid, keep: {2: '${nowhere}'}}}\n")
    with pytest.raises(PolicyError, match=r"stages\.p\.keep.*nowhere"):
        dropflow.load_policy(file)
    for text in ("[1, 2]", "just words", "stages: 3", ""):
        file.write_text(text)
        with pytest.raises(PolicyError):
            dropflow.load_policy(file)


def test_rescaling_keeps_the_proportions() -> None:
    rescaled = dropflow.load_policy("hidrop-64", ["rescale=true"])
    assert per_layer(rescaled, BackboneShape(16, 144)) == (0,) * 4 + (144,) + (54,) * 2 + (3,) + (1,) * 4 + (0,) * 4
    assert per_layer(rescaled) == per_layer("hidrop-64")
    with pytest.raises(PolicyError, match=r"stages\.inject\.at: the absolute number 8 was tuned for 32 layers"):
        per_layer("hidrop-64", BackboneShape(16, 576))
    with pytest.raises(
        PolicyError, match=r"stages\.pyramid\.keep\.10: the absolute number 215 was tuned for 576 visual tokens"
    ):
        per_layer("hidrop-64", BackboneShape(32, None))
    share = ["stages.dpp.keep=0.25"]  # boundary 0 is before any model, for whichever it was tuned
    assert per_layer(dropflow.load_policy("cdpruner-llm-64", share), BackboneShape(5, 40)) == (10,) * 5


def test_every_fault_of_a_file_is_listed_at_once() -> None:
    bad = {
        "name": "x",
        "rescale": "often",
        "stages": {
            "a": {"use": "hidrop/early-exit", "at": -1},
            "b": {"at": 2},
            "c": {"use": "hidrop/concave-pyramid", "keep": {}},
        },
    }
    with pytest.raises(PolicyError) as caught:
        dropflow.load_policy(bad)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["rescale", "stages.a.at", "stages.b.use", "stages.c.keep"]


def test_the_schema_accepts_shipped_policies_and_rejects_misspelt_ones() -> None:
    import yaml

    validator = Draft202012Validator(schema())
    Draft202012Validator.check_schema(schema())
    for name, path in registry.policy_files().items():
        data = yaml.safe_load(path.read_text())
        # JSON has no integer keys
        text = {
            **data,
            "stages": {
                n: {k: {str(b): v for b, v in o.items()} if isinstance(o, dict) else o for k, o in s.items()}
                for n, s in data["stages"].items()
            },
        }
        assert not list(validator.iter_errors(text)), name
        assert dropflow.load_policy(name).name == name == data["name"]
    assert not list(validator.iter_errors({"extends": "hidrop-64", "stages": {"exit": {"at": 23}}}))
    assert not list(validator.iter_errors({"extends": "hidrop-64"}))
    assert list(validator.iter_errors({"extends": "hidrop-64", "rescal": True}))
    assert list(validator.iter_errors({"name": "x"}))
    assert list(validator.iter_errors({"stages": {"a": {"use": "hidrop/early-exit", "att": 2}}}))
    assert list(validator.iter_errors({"stages": {"a": {"use": "hidrop/early-exti", "at": 2}}}))


def points(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    made = EntryPoints(EntryPoint(name, value, registry.STAGES) for name, value in entries)
    monkeypatch.setattr(registry, "_points", lambda group: made.select(group=group))


def test_a_broken_package_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    good = "dropflow_hidrop.early_exit:EarlyExit"
    points(
        monkeypatch,
        ("a/good", good),
        ("b/broken", "no_such_package:Stage"),
        ("c/twice", good),
        ("c/twice", "other:Stage"),
    )
    assert registry.names(registry.STAGES) == ["a/good", "b/broken", "c/twice"]
    assert registry.load(registry.STAGES, "a/good").__name__ == "EarlyExit"
    with pytest.raises(BrokenPlugin, match=r"'b/broken' of package no_such_package:Stage cannot be imported"):
        registry.load(registry.STAGES, "b/broken")
    with pytest.raises(DuplicateName, match=r"'c/twice' is registered by .*uninstall one of them"):
        registry.load(registry.STAGES, "c/twice")
    with pytest.raises(UnknownName, match="did you mean 'a/good'"):
        registry.load(registry.STAGES, "a/goood")


def test_stages_run_in_policy_order(llava: Any) -> None:
    import torch
    from tiny import policy, prompt

    order: list[str] = []

    class Says(dropflow.Stage[Any]):
        prune_at = (2,)

        @dropflow.hookimpl
        def prune(self, call: dropflow.PruneCall) -> dropflow.Keep:
            order.append(self.context.name)
            mask = torch.ones_like(call.valid)
            mask[:, :: 2 if self.context.name == "first" else 3] = False
            return dropflow.Keep(mask, call.hidden[..., 0])

        @dropflow.hookimpl
        def observe(self, event: dropflow.BoundaryEvent) -> None:
            order.append(f"{self.context.name} saw {event.boundary} {','.join(event.scores)}")

    with torch.no_grad(), dropflow.attach(llava, policy(first={"use": Says}, second={"use": Says})) as flow:
        llava(**prompt([(3, "I", 5)]))
        live = flow.live()[2, 0]
    assert order == [
        "first saw 0 ",
        "second saw 0 ",
        "first",
        "second",
        "first saw 2 first,second",
        "second saw 2 first,second",
    ]
    # keeps intersect, text stays
    assert live.nonzero()[:, 0].tolist() == [i for i in range(25) if not 4 <= i < 20 or (i % 2 and i % 3)]
    assert HIDROP["name"] == "test"


def test_a_hook_without_its_marker_is_refused_when_the_policy_is_made() -> None:
    class Forgetful(dropflow.Stage[Any]):
        def prune(self, call: dropflow.PruneCall) -> None: ...

        @dropflow.hookimpl
        def exitt(self, call: dropflow.WindowCall) -> None: ...

        @dropflow.hookimpl
        def encode(self, payload: dropflow.EncodeCall) -> None: ...

    class Marked(dropflow.Stage[Any]):
        @dropflow.hookimpl
        def inject(self) -> int:
            return 1

    class Overrides(Marked):
        def inject(self) -> int:
            return 2

    with pytest.raises(PolicyError) as told:
        dropflow.load_policy({"name": "x", "stages": {"cut": {"use": Forgetful}, "in": {"use": Overrides}}})
    assert str(told.value).splitlines() == [
        "stages.cut: defines encode(self, payload: dropflow.EncodeCall) -> None, expected encode(self, call: "
        "EncodeCall) -> Encode | None",
        "stages.cut: marks exitt with hookimpl, but no hook has this name; did you mean 'exit'?",
        "stages.cut: defines prune, but it is not marked with hookimpl; write @hookimpl above it",
        "stages.cut: defines prune, but at no boundary; name its boundaries in `Forecast.keeps` or in `prune_at`",
        "stages.in: defines inject, but it is not marked with hookimpl; write @hookimpl above it",
    ]
    dropflow.load_policy({"name": "x", "stages": {"in": {"use": Marked}}})


def test_a_prune_that_would_never_be_asked_is_refused() -> None:
    class Nowhere(dropflow.Stage[Any]):
        @dropflow.hookimpl
        def prune(self, call: dropflow.PruneCall) -> None: ...

    class Named(Nowhere):
        prune_at = (2,)

    class Foreseen(Nowhere):
        def forecast(self) -> dropflow.Forecast:
            return dropflow.Forecast(keeps={2: None})

    with pytest.raises(PolicyError, match=r"^stages\.cut: defines prune, but at no boundary; name its boundaries in"):
        dropflow.load_policy({"name": "x", "stages": {"cut": {"use": Nowhere}}})
    dropflow.load_policy({"name": "x", "stages": {"a": {"use": Named}, "b": {"use": Foreseen}}})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"use": "control/random", "keep": 56}, "s.keep: expected a mapping {boundary: tokens}, got 56"),
        ({"use": "hidrop/concave-pyramid"}, "s.keep: field required, a mapping {boundary: tokens or 'solve'}"),
        ({"use": "control/pool", "window": 3}, "s.window: expected a list [integer, integer], got 3"),
        ({"use": "hidrop/early-exit"}, "s.at: field required"),
        ({"at": 3}, "s.use: missing; say which stage it uses (`dropflow list stages` has all)"),
    ],
)
def test_a_fault_says_what_shape_is_expected(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as told:
        dropflow.load_policy({"name": "x", "stages": {"s": entry}})
    assert str(told.value) == f"stages.{message}"


@pytest.mark.parametrize("override", ["stages.pyramd={keep: {10: 343}}", "stages.pyramd.keep.10=343"])
def test_an_override_of_a_misspelt_stage_names_the_stages_of_the_policy(override: str) -> None:
    with pytest.raises(PolicyError, match=r"^stages\.pyramd.*did you mean 'pyramid'\?$"):
        dropflow.load_policy("hidrop-64", [override])
    with pytest.raises(PolicyError, match=r"^stages\.zzz.*: exit, inject, pyramid$"):
        dropflow.load_policy("hidrop-64", [override.replace("pyramd", "zzz")])


def test_what_options_expect_is_told_by_their_types() -> None:
    class Inner(dropflow.StageOptions):
        table: dict[int, list[bool]]

    class Outer(dropflow.StageOptions):
        inner: Inner | None = None
        several: tuple[dropflow.Tokens, ...] = ()
        by_name: dict[str, Inner]

    assert expected(Outer, ("inner",)) == "a mapping {table}"
    assert expected(Outer, ("inner", "table")) == "a mapping {integer: a list [true or false]}"
    assert expected(Outer, ("several",)) == "a list [tokens, ...]"
    assert expected(Outer, ("by_name", "x", "table", "3")) == "a list [true or false]"
    assert expected(Outer, ("nothing",)) == ""

"""A model saved while a policy is attached records it, and `attach` without a policy picks it up."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDROP, RAGGED, policy, prompt, tiny_llava
from transformers import AutoModelForImageTextToText

import dropflow
from dropflow import Stage, StageOptions, hookimpl
from dropflow.errors import PolicyError, UnsupportedModel

FULL = {
    "name": "full",
    "description": "every kind of option",
    "tuned_for": {"layers": 6, "visual_tokens": 16},
    "rescale": True,
    "positions": "compact",
    "stages": {
        "inject": {"use": "hidrop/late-injection", "at": 0.2},
        "pyramid": {"use": "hidrop/concave-pyramid", "keep": {2: "solve", 0.7: 0.25}, "budget": {"average_tokens": 6}},
        "exit": {"use": "hidrop/early-exit", "at": 5},
    },
}


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize("which", [HIDROP, FULL, "hidrop-64"], ids=["plain", "full", "by name"])
@torch.no_grad()
def test_a_saved_model_is_attached_without_naming_its_policy(which: Any, tmp_path: Path) -> None:
    layers = 32 if which == "hidrop-64" else 6
    model = tiny_llava(layers=layers, grid=24 if layers == 32 else 4)
    with dropflow.attach(model, which) as flow:
        loaded = saved(model, tmp_path)
    with dropflow.attach(loaded) as again:
        assert again.policy == flow.policy
        assert again.plan.schedule() == flow.plan.schedule()
        assert saved(loaded, tmp_path / "once more").config.dropflow == loaded.config.dropflow
    assert isinstance(loaded.config.dropflow, dict)
    assert loaded.config.dropflow["stages"].keys() == flow.policy.stages.keys()


@torch.no_grad()
def test_the_recorded_policy_gives_the_same_logits(tmp_path: Path) -> None:
    model, inputs = tiny_llava(), prompt()
    with dropflow.attach(model, HIDROP):
        expected = model(**inputs).logits
        loaded = saved(model, tmp_path).eval()
    with dropflow.attach(loaded):
        assert torch.equal(loaded(**inputs).logits, expected)
    with dropflow.attach(loaded, overrides=["stages.pyramid.keep.2=9"]) as flow:
        assert flow.plan.schedule().per_layer[2] == 9


def test_detach_takes_the_record_back_unless_it_was_to_stay(tmp_path: Path) -> None:
    model = tiny_llava()
    before = copy.deepcopy(model.config.to_dict())
    with dropflow.attach(model, HIDROP):
        assert model.config.dropflow["name"] == "test"
    assert model.config.to_dict() == before
    with dropflow.attach(model, HIDROP) as flow:
        flow.record()
    with dropflow.attach(saved(model, tmp_path)) as flow:
        assert flow.policy == dropflow.load_policy(HIDROP)
    with dropflow.attach(model, RAGGED):  # another policy for a while
        assert "exit" not in model.config.dropflow["stages"]
    assert model.config.dropflow["stages"]["exit"]["at"] == 5


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_that_share_a_config_leave_no_trace_in_it(order: tuple[int, int]) -> None:
    models = [tiny_llava(), tiny_llava()]
    models[1].config = models[0].config
    flows = [dropflow.attach(model, which) for model, which in zip(models, (HIDROP, RAGGED), strict=True)]
    for number in order:
        flows[number].detach()
        flows[number].detach()
    assert not hasattr(models[0].config, "dropflow")


def test_without_a_record_a_policy_has_to_be_named(llava: Any) -> None:
    with pytest.raises(PolicyError, match=r"no policy is given, and none is recorded .*`config\.dropflow`"):
        dropflow.attach(llava)


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (
            {"name": "theirs", "stages": {"cut": {"use": "acme/cutter", "at": 3}}},
            r"^config\.dropflow\.stages\.cut\.use: no stage named 'acme/cutter'; (.|\n)*install the package",
        ),
        ({"name": "theirs"}, r"^config\.dropflow\.stages: "),
        ("hidrop-64", r"^config\.dropflow\.stages: .*'hidrop-64'"),
        ({"stages": {"cut": [0] * 3000}}, r"^config\.dropflow: more than 2,000 entries"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(recorded: Any, message: str) -> None:
    model = tiny_llava()
    model.config.dropflow = recorded
    with pytest.raises(PolicyError, match=message):
        dropflow.attach(model)
    with dropflow.attach(model, RAGGED):
        pass
    assert model.config.dropflow == recorded


def test_a_stage_of_no_package_cannot_be_recorded(llava: Any) -> None:
    class Nameless(Stage[Any]):
        @hookimpl
        def exit(self, call: Any) -> None: ...

    expected = r"stages\.cut\.use: (.|\n)*register them as entry points"
    with dropflow.attach(llava, policy(cut={"use": Nameless})) as flow, pytest.raises(PolicyError, match=expected):
        flow.record()
    assert not hasattr(llava.config, "dropflow")


def test_an_option_that_is_no_plain_data_does_not_keep_a_policy_from_being_attached() -> None:
    class Options(StageOptions):
        see: Callable[[], None]

    class Watch(Stage[Options]):
        @hookimpl
        def exit(self, call: Any) -> None: ...

    Watch.Options = Options
    model = tiny_llava()
    watch = policy(watch={"use": Watch, "see": gc.collect})
    with dropflow.attach(model, watch) as flow, pytest.raises(PolicyError, match="register them as entry points"):
        flow.record()
    assert not hasattr(model.config, "dropflow")


def test_a_flow_that_nobody_holds_stays_attached() -> None:
    """The two lines of a training script: attach, and train."""
    model = tiny_llava()
    dropflow.attach(model, HIDROP)
    gc.collect()
    with pytest.raises(UnsupportedModel, match="already attached to this model"):
        dropflow.attach(model, RAGGED)
    assert model.config.dropflow["stages"]["exit"]["at"] == 5


def recording(**stages: Any) -> Any:
    model = tiny_llava()
    model.config.dropflow = {"name": "theirs", "stages": stages}
    return model


def test_a_record_may_name_local_models_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    asked: list[tuple[str, bool]] = []

    def loads(source: str, *, local_files_only: bool) -> Any:
        asked.append((source, local_files_only))
        raise OSError("nothing there")

    monkeypatch.setattr(AutoConfig, "from_pretrained", loads)
    remote = {"use": "cdpruner/conditional-dpp", "keep": 4, "clip": "some/repo"}
    expected = r"config\.dropflow\.stages\.dpp\.clip: expected a local folder.*`allow_downloads=True`.*got 'some/repo'"
    with pytest.raises(PolicyError, match=expected):
        dropflow.attach(recording(dpp=remote))
    assert asked == []
    for arguments in ({"allow_downloads": True}, {"policy": policy(dpp=remote)}):  # the caller's own word
        with pytest.raises(PolicyError, match="expected a folder or hub name of a CLIP model"):
            dropflow.attach(recording(dpp=remote), **arguments)
    with pytest.raises(PolicyError, match="expected a folder or hub name of a CLIP model"):
        dropflow.attach(recording(dpp={**remote, "clip": str(tmp_path)}))
    assert asked == [("some/repo", False)] * 2 + [(str(tmp_path), True)]


def test_from_pretrained_passes_on_what_a_record_may_name(tmp_path: Path) -> None:
    recording(dpp={"use": "cdpruner/conditional-dpp", "keep": 4, "clip": "some/repo"}).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="expected a local folder"):
        dropflow.from_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="expected a folder or hub name"):  # there is no network in tests
        dropflow.from_pretrained(tmp_path, allow_downloads=True)


def test_a_record_reads_nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFLOW_SECRET", "hunter2")
    early = {"use": "hidrop/early-exit", "at": 5}
    for recorded, message in (
        ({"name": "${oc.env:DROPFLOW_SECRET}", "stages": {"e": early}}, r"^config\.dropflow\.name: expected `\$\{path"),
        ({"extends": "hidrop-64", "stages": {}}, r"^config\.dropflow\.extends: a recorded policy cannot extend"),
        ({"name": "../../x", "stages": {"e": early}}, r"^config\.dropflow\.name: expected a plain name"),
        ({"name": "a\nb", "stages": {"e": early}}, r"^config\.dropflow\.name: expected a plain name.*'a\\nb'"),
    ):
        model = tiny_llava()
        model.config.dropflow = recorded
        with pytest.raises(PolicyError, match=message) as caught:
            dropflow.attach(model)
        assert "hunter2" not in str(caught.value)
        assert model.config.dropflow == recorded


def test_a_stage_may_be_named_by_a_number() -> None:
    model = tiny_llava()
    with dropflow.attach(model, policy(**{"10": {"use": "hidrop/early-exit", "at": 5}})) as flow:
        flow.record()
    with dropflow.attach(model) as flow:
        assert list(flow.policy.stages) == ["10"]

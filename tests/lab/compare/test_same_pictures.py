"""Questions about the same picture begin with a prefix, and their answers and tokens are those of asking anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dropflow
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow_lab.compare import answers
from dropflow_lab.compare.answers import ask
from dropflow_lab.inputs.data import Sample, read_samples
from dropflow_lab.inputs.models import load_model

POLICIES = {
    "hidrop": {
        "inject": {"use": "hidrop/late-injection", "at": 1},
        "pyramid": {"use": "hidrop/concave-pyramid", "keep": {2: 40}},
    },
    "encodes": {"few": {"use": "control/stride", "encode": 30}},
    "fastv": {"rank": {"use": "fastv/attention-rank", "at": 2, "keep": 20}},
    "evicts": {
        "keys": {"use": "mustdrop/key-set", "share": 0.1},
        "filter": {
            "use": "mustdrop/dual-attention",
            "at": [1, 2],
            "global_threshold": 0.01,
            "individual_threshold": 0.02,
        },
        "cache": {"use": "mustdrop/output-aware-cache", "at": 2},
    },
}


@pytest.fixture(scope="module")
def subject(model_folder: Path) -> tuple[Any, Any]:
    return load_model(model_folder)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Seven questions: five about one picture, of which one is asked between two others about pictures of their own."""
    drawn = read_samples("digits", 7)
    return [one if place in (1, 5) else replace(one, pictures=drawn[0].pictures) for place, one in enumerate(drawn)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The boundaries of the prefixes that were made."""
    found: list[int] = []
    real = dropflow.Flow.prefix

    def noted(self: dropflow.Flow, **inputs: Any) -> dropflow.Prefix:
        prefix = real(self, **inputs)
        found.append(prefix.boundary)
        return prefix

    monkeypatch.setattr(dropflow.Flow, "prefix", noted)
    return found


def _policy(which: str) -> dropflow.Policy:
    return dropflow.load_policy({"name": which, "stages": POLICIES[which]})


def _ask(subject: tuple[Any, Any], policy: dropflow.Policy | None, samples: list[Sample]) -> answers.Answers:
    return ask(*subject, policy, samples, batch=3, max_new_tokens=4)


def test_batches_hold_questions_about_the_same_picture_or_about_others(samples: list[Sample]) -> None:
    assert answers._batches(samples, 3) == [[0, 2, 3], [4, 6], [1, 5]]
    assert answers._batches(read_samples("digits", 5), 2) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("which", "boundary"), [("hidrop", 2), ("encodes", 4), ("fastv", 2), ("evicts", 1)])
def test_answers_and_tokens_are_those_of_asking_anew(
    subject: tuple[Any, Any], samples: list[Sample], made: list[int], which: str, boundary: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    begun = _ask(subject, _policy(which), samples)
    assert made == [boundary]  # one prefix for two batches about the picture
    monkeypatch.setattr(answers._Asking, "_shared", lambda *_: None)
    anew = _ask(subject, _policy(which), samples)
    assert made == [boundary]
    assert begun.said == anew.said
    assert begun.average_visual_tokens == pytest.approx(anew.average_visual_tokens)
    assert begun.average_visual_tokens_answer == pytest.approx(anew.average_visual_tokens_answer)
    assert begun.entry_visual_tokens == anew.entry_visual_tokens


def test_questions_about_the_same_video(
    subject: tuple[Any, Any], samples: list[Sample], made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = tuple(picture for one in samples[:2] for picture in one.pictures)
    asked = [replace(one, pictures=frames, videos=((0, 1),)) for one in samples[:3]]
    asked.append(replace(asked[0], videos=()))  # the same pictures, but no video
    thinned = dropflow.load_policy({"name": "thinned", "stages": {"frames": {"use": "dycoke/temporal", "drop": 0.7}}})
    assert answers._batches(asked, 4) == [[0, 1, 2], [3]]
    begun = _ask(subject, thinned, asked)
    assert made == [4]
    monkeypatch.setattr(answers._Asking, "_shared", lambda *_: None)
    assert _ask(subject, thinned, asked).said == begun.said


def test_without_a_policy_and_without_stages_nothing_is_prefixed(
    subject: tuple[Any, Any], samples: list[Sample], made: list[int]
) -> None:
    dense = _ask(subject, None, samples)
    idle = _ask(subject, dropflow.load_policy({"name": "idle", "stages": {}}), samples)
    assert (dense, made) == (idle, [])
    assert dense.average_visual_tokens == 144


def test_where_prefixes_are_refused_questions_are_asked_anew(
    subject: tuple[Any, Any], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _ask(subject, _policy("hidrop"), samples)
    two = [*samples, *(replace(one, pictures=samples[1].pictures) for one in samples[2:4])]
    tried: list[type[Exception]] = []

    def refusing(kind: type[Exception]) -> Any:
        def refused(*_: Any, **__: Any) -> Any:
            tried.append(kind)
            raise kind("prefix: not here")

        return refused

    for kind in (UnsupportedModel, UnsupportedCall):
        monkeypatch.setattr(dropflow.Flow, "prefix", refusing(kind))
        assert _ask(subject, _policy("hidrop"), samples) == whole
        _ask(subject, _policy("hidrop"), two)
    assert tried == [UnsupportedModel] * 2 + [UnsupportedCall] * 2  # once in each run


def test_a_question_that_the_prefix_does_not_fit_is_asked_anew(
    subject: tuple[Any, Any], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _ask(subject, _policy("hidrop"), samples)

    def refused(*_: Any, **__: Any) -> Any:
        raise UnsupportedCall("prefix: vision takes part in other layers")

    monkeypatch.setattr(dropflow.Prefix, "inputs", refused)
    assert _ask(subject, _policy("hidrop"), samples) == whole

"""Requests about the same pictures begin with a prefix: the same answers, and nothing from one owner to another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from serving import Started, asking, messages, uri

import dropflow
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow_lab.inputs.data import Sample
from dropflow_lab.inputs.models import load_model
from dropflow_lab.serve.prompt import Prompt, prepare
from dropflow_lab.serve.reuse import Reuse
from dropflow_lab.serve.waiting import Choice, Waiting

for needed in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(needed, reason=f"{needed} is of the extra `serve`")
pytest.importorskip("openai", reason="openai is of the extra `dev`")

QUESTIONS = ("how many digits are there ?", "read all digits row by row .", "what is the largest digit ?")
MODEL = "digits@digits-mild"


def metric(served: Started, name: str, key: str = "none") -> float:
    """The value of a metric, summed over its labels."""
    text = served.raw("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})[1]
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def about(sample: Sample, question: str) -> list[dict[str, Any]]:
    (picture,) = sample.images()
    return asking(uri(picture), question)


def test_answers_are_the_same_with_and_without(start: Any, samples: list[Sample]) -> None:
    asked = [about(samples[n], question) for question in QUESTIONS for n in range(2)]
    first = asked[0]
    asked += [
        [*first, {"role": "assistant", "content": "4"}, {"role": "user", "content": question}]
        for question in QUESTIONS[1:]
    ]
    said = {}
    for memory in (0, 2**28):
        with start(prefix_bytes=memory) as served:
            said[memory] = [served.ask(model, of) for model in (MODEL, "digits@dense") for of in asked]
            hits, made = (metric(served, f"dropflow_prefix{end}_total") for end in ("_hits", "es_made"))
            held = metric(served, "dropflow_prefix_bytes")
    assert said[0] == said[2**28]
    # two pictures: asked anew, then with a prefix that is made, then with one that is there; dense has none
    assert (made, hits) == (2, 4)
    assert 0 < held < 2**28


def test_without_memory_nothing_is_shared(start: Any, samples: list[Sample]) -> None:
    with start(prefix_bytes=0) as served:
        for question in QUESTIONS:
            served.ask(MODEL, about(samples[0], question))
        names = ("dropflow_prefix_hits_total", "dropflow_prefixes_made_total", "dropflow_prefix_bytes")
        assert [metric(served, name) for name in names] == [0, 0, 0]


def test_owners_share_nothing(start: Any, samples: list[Sample]) -> None:
    with start(keys=("a", "b")) as served:
        clients = {key: served.client(key) for key in ("a", "b")}
        for key in ("a", "b", "a"):
            clients[key].chat.completions.create(model=MODEL, messages=messages(samples[0]))
        assert metric(served, "dropflow_prefixes_made_total", "a") == 1  # the second time that `a` asks
        clients["b"].chat.completions.create(model=MODEL, messages=messages(samples[0]))
        assert metric(served, "dropflow_prefixes_made_total", "a") == 2
        assert metric(served, "dropflow_prefix_hits_total", "a") == 0


def test_clients_at_once_get_their_own_answers(start: Any, samples: list[Sample]) -> None:
    asked = [about(samples[n], question) for n in range(3) for question in QUESTIONS] * 3
    with start(prefix_bytes=0, batch=1) as served:
        alone = [served.ask(MODEL, of) for of in asked[:9]] * 3
    with start() as served, ThreadPoolExecutor(8) as clients:
        assert list(clients.map(lambda of: served.ask(MODEL, of), asked)) == alone


@pytest.fixture(scope="module")
def subject() -> Any:
    return load_model()


class Line:
    """Requests to a `Reuse`, by hand."""

    def __init__(self, subject: Any, samples: list[Sample], flows: dropflow.FlowSet, limit: int) -> None:
        self._model, self._processor = subject
        self._samples, self._flows = samples, flows
        self.reuse = Reuse(self._model, flows, limit)

    def prompt(self, sample: int, question: str = QUESTIONS[0], before: str = "") -> Prompt:
        (picture,) = self._samples[sample].images()
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        earlier = [{"role": "user", "content": [{"type": "text", "text": before}]}] if before else []
        return prepare(self._processor, [*earlier, {"role": "user", "content": parts}], 1024)

    def waiting(self, sample: int, question: str = QUESTIONS[0], owner: str = "") -> Waiting:
        prompt = self.prompt(sample, question)
        return Waiting(prompt, "mild", Choice(1), lambda _: None, self.reuse.digest(prompt, "mild", owner))

    def shared(self, *batch: Waiting) -> dropflow.Prefix | None:
        with self._flows.using("mild"):
            return self.reuse.shared(batch, lambda request: request.prompt.inputs)


def test_what_stands_for_a_beginning(subject: Any, samples: list[Sample]) -> None:
    chosen = {"mild": dropflow.load_policy("digits-mild"), "other": dropflow.load_policy("mustdrop-digits")}
    with dropflow.attach_set(subject[0], chosen | {"dense": None}, default="mild") as flows:
        line = Line(subject, samples, flows, 2**28)
        digest = line.reuse.digest
        one = digest(line.prompt(0), "mild", "a")
        assert one == digest(line.prompt(0, QUESTIONS[1]), "mild", "a")
        others = [
            digest(line.prompt(1), "mild", "a"),
            digest(line.prompt(0), "other", "a"),
            digest(line.prompt(0), "mild", "b"),
            digest(line.prompt(0, before="read all"), "mild", "a"),
        ]
        assert len({one, *others}) == 5
        assert digest(line.prompt(0), "dense", "a") is None
        words = prepare(subject[1], [{"role": "user", "content": [{"type": "text", "text": "yes"}]}], 1024)
        assert digest(words, "mild", "a") is None
        strange = Prompt(line.prompt(0).inputs | {"names": ["x"]}, "")
        assert digest(strange, "mild", "a") is None


@torch.no_grad()
def test_a_beginning_is_shared_when_it_returns_or_fills_a_batch(subject: Any, samples: list[Sample]) -> None:
    with dropflow.attach_set(subject[0], {"mild": dropflow.load_policy("digits-mild")}, default="mild") as flows:
        line = Line(subject, samples, flows, 2**28)
        assert line.shared(line.waiting(0)) is None  # the first time
        assert line.shared(line.waiting(0), line.waiting(1)) is None  # others beside it
        prefix = line.shared(line.waiting(0, QUESTIONS[1]))
        assert prefix is not None
        assert line.shared(line.waiting(0), line.waiting(0, QUESTIONS[2])) is prefix
        assert line.shared(line.waiting(2), line.waiting(2, QUESTIONS[1])) is not None  # new, but twice
        assert line.shared(line.waiting(0, owner="b")) is None
        assert (line.reuse.made, line.reuse.hits) == ({"mild": 2}, {"mild": 3})
        assert line.reuse.nbytes == 2 * prefix.nbytes


@torch.no_grad()
def test_what_does_not_fit_or_is_refused_is_asked_anew_from_then_on(
    subject: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    with dropflow.attach_set(subject[0], {"mild": dropflow.load_policy("digits-mild")}, default="mild") as flows:
        small = Line(subject, samples, flows, 1000)
        pair = (small.waiting(0), small.waiting(0, QUESTIONS[1]))
        assert small.shared(*pair) is not None  # made, and too large to be kept
        assert (small.shared(*pair), small.reuse.made, small.reuse.nbytes) == (None, {"mild": 1}, 0)
        tried: list[type[Exception]] = []

        def refused(*_: Any, **__: Any) -> Any:
            tried.append(kind)
            raise kind("prefix: not here")

        monkeypatch.setattr(dropflow.Flow, "prefix", refused)
        for kind, times in ((UnsupportedCall, 2), (UnsupportedModel, 1)):
            line = Line(subject, samples, flows, 2**28)
            for sample in (0, 0, 1):
                assert line.shared(line.waiting(sample), line.waiting(sample)) is None
            assert tried == [kind] * times  # for each beginning, or once for the model
            tried.clear()


def test_a_question_that_a_prefix_does_not_fit_is_asked_anew(
    start: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    with start() as served:
        anew = [served.ask(MODEL, about(samples[0], question)) for question in QUESTIONS]

        def refused(*_: Any, **__: Any) -> Any:
            raise UnsupportedCall("prefix: vision takes part in other layers")

        monkeypatch.setattr(dropflow.Prefix, "inputs", refused)
        assert [served.ask(MODEL, about(samples[0], question)) for question in QUESTIONS] == anew

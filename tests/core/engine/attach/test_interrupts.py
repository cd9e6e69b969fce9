"""At whatever engine line an interrupt occurs, the next call is correct, detaching leaves no trace, no thread hangs."""

from __future__ import annotations

import ast
import functools
import gc
import os
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import ERRORS, Line, Worker, act_at, in_child, interrupt_at, lines_passed
from tiny import policy, prompt, tiny_llava
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.testing.guarantees import fingerprint

INPUTS = prompt(((3, "I", 5), ("I", 2)))
ENCODING = {
    "merge": {"use": "tome/token-merging", "r": 2, "layers": 2},
    "keys": {"use": "mustdrop/key-set", "share": 0.1, "layer": 2},
}
PRUNING = {
    "ahead": {"use": "fastv/attention-rank", "at": 1, "keep": 6},
    "pyramid": {"use": "hidrop/concave-pyramid", "keep": {1: 3}},
}
CACHE = {"cache": {"use": "mustdrop/output-aware-cache", "at": 1, "interval": 1, "threshold": 0.01}}


@torch.no_grad()
def features(model: Any) -> Tensor:
    """Features of images that are encoded by a direct call."""
    return torch.cat(list(model.model.get_image_features(INPUTS["pixel_values"]).pooler_output))


@torch.no_grad()
def prefill(model: Any) -> Tensor:
    """Logits of a prompt."""
    logits: Tensor = model(**INPUTS, use_cache=False).logits
    return logits


@torch.no_grad()
def answer(model: Any) -> Tensor:
    """Logits of a prompt and of the first generated token."""
    cache = DynamicCache()
    first = model(**INPUTS, **{CACHE_ARGUMENT: cache}).logits
    token = first[:, -1:].argmax(-1)
    mask = torch.cat((INPUTS["attention_mask"], torch.ones_like(token)), 1)
    second = model(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits
    return torch.cat((first, second), 1)


@dataclass(frozen=True)
class Scene:
    """A call under a policy that is interrupted."""

    policy: dict[str, Any]
    run: Callable[[Any], Tensor]
    overlap: bool = False


SCENES = {
    "encoder": Scene(policy(**ENCODING), features),
    "prefill": Scene(policy(**PRUNING), prefill),
    "answer": Scene(policy(**PRUNING, **CACHE), answer),
    "parked": Scene(policy(read={"use": "visionpulse/decode-read", "at": 1, "fixed": 0.3}), answer),
    "everything": Scene(policy(**ENCODING, **PRUNING, **CACHE), answer),
    "overlap": Scene(policy(**ENCODING, enter={"use": "hidrop/late-injection", "at": 1}), prefill, overlap=True),
}
"""Scenes, cheap ones first: a line is tested in the first scene that executes it."""


class Subject:
    """A model, its output without and with the scene's policy, and its state with nothing attached."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.model, self.worker, self.other = scene, tiny_llava(layers=2), Worker(), Worker()
        self.plain, self.before = self.call(), self.state()
        with dropflow.attach(self.model, scene.policy, overlap=scene.overlap):
            self.reference = self.call()
        assert not torch.equal(self.plain, self.reference)
        self.policy = dropflow.load_policy(scene.policy)

    def call(self) -> Tensor:
        """The current output of the scene's call."""
        return self.scene.run(self.model)

    def state(self) -> list[Any]:
        """Everything that may be left on a model."""
        recorded = getattr(self.model.config, "dropflow", None)
        return [fingerprint(self.model), recorded, dict(ALL_ATTENTION_FUNCTIONS)]

    def interrupt(self, line: Line, error: type[BaseException], run: Callable[[], Any]) -> bool:
        """Raise `error` at a line of `run`, in the worker; return whether it was raised."""
        return self.worker.run(lambda: interrupt_at(line, error, run))

    def check_attached(self, worker: Worker) -> None:
        """Check that the next call is not affected."""
        assert torch.equal(worker.run(self.call), self.reference), "another output under the policy"

    def check_detached(self) -> None:
        """Check that nothing is left on the model."""
        self.worker.run(lambda: dropflow.detach(self.model))
        for name, own, was in zip(("model", "config", "attention"), self.state(), self.before, strict=True):
            assert own == was, f"detaching has left something: {name}"
        assert torch.equal(self.worker.run(self.call), self.plain), "another output of the plain model"

    def right_by_itself(self) -> bool:
        """Whether the outputs with and without the policy are correct in this thread."""
        right = torch.equal(self.call(), self.reference)
        dropflow.detach(self.model)
        return right and self.state() == self.before and torch.equal(self.call(), self.plain)

    def attach(self) -> None:
        """Attach the policy in the thread that is interrupted."""
        self.worker.run(lambda: dropflow.attach(self.model, self.policy, overlap=self.scene.overlap))


OWN = (
    *("tokens/", "decoder/decide_", "decoder/layer_arguments", "decoder/probe", "decoder/prompt_run", "decoder/record"),
    *("vision/", "model/attention", "attach/refusals"),
)
"""Engine files that work on objects of one call and shadow others only through `model/shadowing.py`; by default, every
ninth of their lines is tested."""


@functools.cache
def lines_of_scenes() -> dict[str, list[Line]]:
    """All engine lines that each scene executes, in order, in the first call after attaching."""
    found = {}
    for name, scene in SCENES.items():
        subject = Subject(scene)
        subject.attach()
        found[name] = subject.worker.run(functools.partial(lines_passed, subject.call))
    return found


def first_passes(name: str) -> list[Line]:
    """The first execution of every line that no earlier scene executes; for some files, only every ninth one."""
    seen: set[tuple[str, int]] = set()
    for other, lines in lines_of_scenes().items():
        own = [line for line in lines if line.time == 1 and (line.file, line.number) not in seen]
        if other == name:
            return [line for line in own if line.number % 9 == 0 or not any(part in line.file for part in OWN)]
        seen |= {(line.file, line.number) for line in lines}
    raise LookupError(name)


def interrupted_calls(name: str, lines: Sequence[Line], detached_every: int) -> list[str]:
    """Interrupt a call at each of the lines; return what was wrong afterwards."""
    scene, faults, struck = SCENES[name], [], 0
    subject = Subject(scene)
    subject.attach()
    for number, line in enumerate(lines):
        error = ERRORS[number % 2]
        try:
            struck += subject.interrupt(line, error, subject.call)
            subject.check_attached(subject.worker)
            if number % 10 == 0:
                subject.check_attached(subject.other)
            if number % detached_every == 0:
                subject.check_detached()
                subject.attach()
        except Exception as fault:  # noqa: BLE001  # all of them are reported at the end
            faults.append(f"{error.__name__} at {line}: {type(fault).__name__}: {fault}")
            subject = Subject(scene)
            subject.attach()
    assert struck >= 0.99 * len(lines)
    return faults


@pytest.mark.parametrize("name", ["encoder", "prefill", "answer", "overlap", "parked"])
def test_a_call_may_be_interrupted_at_any_line_of_the_engine(name: str) -> None:
    lines = first_passes(name)
    assert len(lines) > 50
    faults = interrupted_calls(name, lines, detached_every=8)
    assert not faults, told(faults, lines)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SCENES)
def test_a_call_may_be_interrupted_whenever_a_line_is_passed(name: str) -> None:
    lines = lines_of_scenes()[name]
    faults = interrupted_calls(name, lines, detached_every=1)
    assert not faults, told(faults, lines)


def told(faults: Sequence[str], lines: Collection[Line]) -> str:
    """The faults as readable text."""
    return "\n".join([f"{len(faults)} of {len(lines)} interrupts", *faults[:40]])


def attach_and_detach(subject: Subject) -> None:
    """An empty `with` block under the policy."""
    with dropflow.attach(subject.model, subject.policy):
        pass


def attach_a_set_and_detach(subject: Subject) -> None:
    """An empty `with` block under a set of policies."""
    with dropflow.attach_set(subject.model, {"dense": None, "one": subject.policy}, default="one"):
        pass


def test_attaching_and_detaching_may_be_interrupted_at_any_line() -> None:
    scene = SCENES["prefill"]
    subject, seen, faults = Subject(scene), set[Line](), list[str]()
    for block in (attach_and_detach, attach_a_set_and_detach):
        lines = [line for line in lines_passed(functools.partial(block, subject)) if line.time == 1]
        for number, line in enumerate(line for line in lines if line not in seen):
            error = ERRORS[number % 2]
            try:
                assert subject.interrupt(line, error, functools.partial(block, subject))
                gc.collect(0)
                subject.check_detached()
                subject.attach()
                if number % 4 == 0:
                    subject.check_attached(subject.other)
                dropflow.detach(subject.model)
            except Exception as fault:  # noqa: BLE001  # all of them are reported at the end
                faults.append(f"{error.__name__} at {line}: {type(fault).__name__}: {fault}")
                subject = Subject(scene)
        seen |= set(lines)
    assert len(seen) > 150
    assert not faults, told(faults, seen)


def forks_in_calls(name: str, lines: Sequence[Line]) -> list[str]:
    """Fork while another thread is at each of the lines; return what was wrong in the child or in that thread."""
    subject, faults = Subject(SCENES[name]), []
    for line in lines:
        subject.attach()
        reached, go = threading.Event(), threading.Event()

        def pause(reached: threading.Event = reached, go: threading.Event = go) -> None:
            reached.set()
            go.wait(60)

        begun = subject.worker.start(functools.partial(act_at, line, pause, subject.call))
        assert reached.wait(20), line
        code = in_child(subject.right_by_itself)
        go.set()
        if code or not begun.result(20):
            faults.append(f"{line}: {code}")
        subject.check_attached(subject.other)
        dropflow.detach(subject.model)
    return faults


forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
warned = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


@forking
@warned
@pytest.mark.parametrize("name", ["encoder", "prefill", "overlap"])
def test_a_process_may_be_forked_while_another_thread_is_at_any_line(name: str) -> None:
    lines = first_passes(name)[::40]
    faults = forks_in_calls(name, lines)
    assert not faults, told(faults, lines)


@forking
@warned
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SCENES)
def test_a_process_may_be_forked_while_another_thread_passes_a_line(name: str) -> None:
    lines = [line for line in lines_of_scenes()[name] if line.time == 1]
    faults = forks_in_calls(name, lines)
    assert not faults, told(faults, lines)


def test_what_an_interrupted_block_has_stated_counts_no_more() -> None:
    subject = Subject(SCENES["encoder"])
    names = {"dense": None, "zip": subject.policy, "pool": policy(pool={"use": "control/pool", "window": [2, 2]})}
    flows = dropflow.attach_set(subject.model, names, default="zip")
    stated = torch.ones(2, 21, dtype=torch.bool)

    def block() -> None:
        with flows.using("pool") as flow, flows.using("dense"), flow.visual(stated):
            pass

    faults, lines = [], lines_passed(block)
    for number, line in enumerate(lines):
        error = ERRORS[number % 2]
        try:
            subject.interrupt(line, error, block)
            subject.check_attached(subject.worker)
        except Exception as fault:  # noqa: BLE001  # all of them are reported at the end
            faults.append(f"{error.__name__} at {line}: {type(fault).__name__}: {fault}")
    assert not faults, told(faults, lines)


@pytest.fixture
def unraised(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only interrupts are raised where Python lets no exception propagate, as in a garbage-collector callback."""
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda it: found.append((it.exc_type, it.exc_value, it.object)))
    yield
    assert all(kind is KeyboardInterrupt for kind, *_ in found), found


def interrupts_at_random_moments(scene: Scene, count: int) -> list[str]:
    """Interrupt attaching, calling and detaching the given number of times; return what was wrong afterwards."""
    dice, faults = random.Random(0), []
    subject = Subject(scene)

    entered = threading.Event()

    def live() -> None:
        try:
            entered.set()
            while True:
                with dropflow.attach(subject.model, subject.policy):
                    subject.call()
        except KeyboardInterrupt:
            return

    started = time.perf_counter()
    attach_and_detach(subject)
    subject.call()
    most = 2 * (time.perf_counter() - started)
    for number in range(count):
        try:
            entered.clear()
            ended = subject.worker.start(live)
            assert entered.wait(20)
            time.sleep(dice.uniform(0, most))
            subject.worker.interrupt()
            if not ended.wait(2):  # raised where Python lets no exception propagate, e.g. in a gc callback
                subject.worker.interrupt()
            ended.result(20)
            subject.check_detached()
            if number % 5 == 0:
                subject.attach()
                subject.check_attached(subject.worker)
                subject.check_attached(subject.other)
                dropflow.detach(subject.model)
        except Exception as fault:  # noqa: BLE001  # all of them are reported at the end
            faults.append(f"{number}: {type(fault).__name__}: {fault}")
            subject = Subject(scene)
    return faults


@pytest.mark.usefixtures("unraised")
def test_interrupts_at_random_moments_leave_a_model_right() -> None:
    faults = interrupts_at_random_moments(SCENES["prefill"], 60)
    assert not faults, "\n".join(faults[:40])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("unraised")
def test_ten_thousand_interrupts_at_random_moments_leave_a_model_right() -> None:
    faults = interrupts_at_random_moments(SCENES["everything"], 10_000)
    assert not faults, "\n".join([str(len(faults)), *faults[:40]])


@functools.cache
def lines_of_handlers(file: str) -> set[int]:
    """The lines of a file's `except` clauses.

    What a trace function raises there can leave the exception that is being handled in the thread's state: Python 3.11
    drops it by an instruction that no handler covers.
    """
    handlers = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.ExceptHandler)]
    return {number for node in handlers for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def test_a_model_is_freed_after_interrupts() -> None:
    for name in ("encoder", "answer"):
        lines = [line for line in lines_of_scenes()[name] if line.number not in lines_of_handlers(line.file)]
        subject = Subject(SCENES[name])
        subject.attach()
        for line in lines[:: len(lines) // 40]:
            subject.interrupt(line, KeyboardInterrupt, subject.call)
        dropflow.detach(subject.model)
        gone = weakref.ref(subject.model)
        worker = subject.worker
        del subject
        gc.collect()
        assert gone() is None, name
        worker.end()

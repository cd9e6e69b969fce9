"""A server of the embedded model in this process, and what the model answers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serving import Started

import dropflow
from dropflow_lab.inputs.data import Sample, read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.inputs.prompts import build_inputs

POLICIES = ("mustdrop-digits", "digits-mild")
MODELS = {"digits@mustdrop-digits": POLICIES[0], "digits@digits-mild": POLICIES[1], "digits@dense": None}
Start = Callable[..., Any]


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Digits questions, each about a picture of its own."""
    return read_samples("digits", 9)


@pytest.fixture(scope="session")
def alone(samples: list[Sample]) -> dict[str, list[str]]:
    """Model name -> what `generate` alone answers to every question, one by one."""
    model, processor = load_model()
    said: dict[str, list[str]] = {}
    for name, policy in MODELS.items():
        flow = None if policy is None else dropflow.attach(model, policy)
        said[name] = []
        for sample in samples:
            inputs = build_inputs(processor, [(sample.images(), sample.question)])
            with dropflow.questions([sample.question]):
                out = model.generate(**inputs, do_sample=False, max_new_tokens=32)
            new = out[:, inputs["input_ids"].shape[1] :]
            said[name] += processor.batch_decode(new, skip_special_tokens=True)
        if flow is not None:
            flow.detach()
    return said


@pytest.fixture(scope="session")
def start() -> Start:
    """Start a server of the embedded model, with some limits and keys; a context manager."""

    @contextmanager
    def started(keys: tuple[str, ...] = (), policies: tuple[str, ...] = POLICIES, **limits: Any) -> Iterator[Started]:
        from dropflow_lab.serve.keys import Keys
        from dropflow_lab.serve.limits import Limits
        from dropflow_lab.serve.names import Names
        from dropflow_lab.serve.server import Server, serving

        model, processor = load_model()
        names = Names.of("digits", [dropflow.load_policy(policy) for policy in policies])
        server = Server(model, processor, names, Limits(**limits), Keys(list(keys)), "127.0.0.1", 0)
        with serving(server):
            yield Started(server)
        assert dropflow.flow_of(model) is None

    return started


@pytest.fixture(scope="session")
def served(start: Start) -> Iterator[Started]:
    """A server with small limits, shared by all tests."""
    with start(images=2, pixels=500 * 500, body_bytes=2_000_000, answer_tokens=64, queue=128) as one:
        yield one

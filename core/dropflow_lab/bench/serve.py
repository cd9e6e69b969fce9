"""The benchmark of the server: throughput and times under concurrency, without and with policies, in turn."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import dropflow
from dropflow_lab.bench import load
from dropflow_lab.bench.load import Burst, Load
from dropflow_lab.bench.random_llava import SHAPES, SubjectShape, build_model
from dropflow_lab.digits.checkpoints.model import build_processor
from dropflow_lab.digits.data.questions import VOCABULARY
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import DIGITS, read_samples
from dropflow_lab.inputs.models import load_model
from dropflow_lab.measure.machine import Machine, this_machine, torch_threads
from dropflow_lab.measure.timing import Spread, ratio
from dropflow_lab.serve.keys import Keys
from dropflow_lab.serve.limits import Limits
from dropflow_lab.serve.names import DENSE, Names
from dropflow_lab.serve.server import Server, serving

CLIENTS = (1, 8, 32)
SUBJECTS = (DIGITS, *SHAPES)
"""The embedded model, and the random models of `random_llava`."""
_PICTURES = 32
_QUESTION = "read all digits from left to right"
"""Has longer answers than other questions, so that there is a time per token."""
_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class ServeRow:
    """One policy at one number of clients."""

    policy: str
    """`dense` for none."""
    clients: int
    requests_per_second: Spread
    tokens_per_second: Spread
    """Tokens of answers."""
    first_token_seconds: Spread
    """Median over the requests of a round, from asking to the first text."""
    token_seconds: Spread
    """The same, per further token of an answer."""
    gain: Spread
    """Requests per second over those of `dense` in the same round."""
    cpu_seconds: Spread
    """CPU time of the server's process per request; hardly affected by what else the machine runs."""
    cpu_gain: Spread
    """CPU time of `dense` over that of this policy, in the same round."""


@dataclass(frozen=True)
class ServeBench:
    """The server on one model."""

    subject: str
    rows: tuple[ServeRow, ...]
    batch: int
    rounds: int
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def kept(self, policy: str) -> dict[int, float]:
        """Return, by number of clients, which share of a policy's gain with the fewest clients it still has.

        Gains in CPU time, which other programs affect least.
        """
        gains = {row.clients: row.cpu_gain.median for row in self.rows if row.policy == policy}
        return {clients: gain / gains[min(gains)] for clients, gain in gains.items()}


def bench_serve(
    subject: str,
    policies: Sequence[str],
    *,
    clients: Sequence[int] = CLIENTS,
    requests: int = 4,
    rounds: int = 5,
    batch: int = 8,
    threads: int = 1,
) -> ServeBench:
    """Serve a model in this process, ask it from another one, and measure what the clients see.

    In every round, each number of clients asks `requests` requests per client of each policy, and of none; every other
    round in reverse. A first round is discarded. Raises `InputError` if a request fails.
    """
    shape = None if subject == DIGITS else replace(SHAPES[subject], vocabulary=len(VOCABULARY))
    loaded, processor = load_model() if shape is None else (_answering(build_model(shape)), _processor(shape))
    bodies = list(_bodies(shape))
    overrides = () if shape is None else ("rescale=true",)
    names = Names.of(subject, [dropflow.load_policy(policy, overrides) for policy in policies])
    # pictures return in every round, and what is measured is a policy, not the reuse of prefixes
    limits = Limits(batch=batch, queue=4 * max(clients), seconds=3600, prefix_bytes=0)
    order = [DENSE, *(name for name in names.policies if name != DENSE)]
    bursts: dict[tuple[str, int], list[Burst]] = {(name, n): [] for n in clients for name in order}
    with torch_threads(threads), serving(Server(loaded, processor, names, limits, Keys([]), "127.0.0.1", 0)) as server:
        for index in range(rounds + 1):
            for number in clients:
                for name in order if index % 2 else order[::-1]:
                    asked = Load(server.port, bodies, names.full(name), number, number * requests)
                    burst = _burst(asked)
                    if index:
                        bursts[name, number].append(burst)
        machine = this_machine()
    rows = tuple(_row(name, n, bursts[name, n], bursts[DENSE, n]) for n in clients for name in order)
    return ServeBench(subject, rows, batch, rounds, machine)


def _burst(asked: Load) -> Burst:
    before = time.process_time()
    program, given = [sys.executable, str(load.__file__)], json.dumps(asdict(asked))
    done = subprocess.run(program, input=given, capture_output=True, text=True, check=True)
    burst = Burst(**json.loads(done.stdout))
    burst.server_cpu = (time.process_time() - before) / asked.requests
    if burst.failed:
        failed = f"{len(burst.failed)} of {asked.requests} requests failed: {burst.failed[0]}"
        raise InputError(f"bench serve: {failed}; see the log above")
    return burst


def _row(name: str, clients: int, bursts: list[Burst], dense: list[Burst]) -> ServeRow:
    def spread(of: Callable[[Burst], float]) -> Spread:
        return Spread.of([of(burst) for burst in bursts])

    def rate(burst: Burst) -> float:
        return len(burst.first) / burst.seconds

    return ServeRow(
        name,
        clients,
        spread(rate),
        spread(lambda burst: burst.tokens / burst.seconds),
        spread(lambda burst: median(burst.first)),
        spread(lambda burst: median(burst.token)),
        ratio([rate(burst) for burst in bursts], [rate(burst) for burst in dense]),
        spread(lambda burst: burst.server_cpu),
        ratio([burst.server_cpu for burst in dense], [burst.server_cpu for burst in bursts]),
    )


def _bodies(shape: SubjectShape | None) -> Iterator[dict[str, Any]]:
    """Ask for all digits of a picture, each time of another one; a random model gives answers of one length."""
    for sample in read_samples(DIGITS, _PICTURES):
        (picture,) = sample.images()
        text = _QUESTION
        if shape is not None:
            picture = picture.resize((shape.image_side * 14,) * 2)
            text = " ".join((text.split() * shape.text_tokens)[: shape.text_tokens])
        data = io.BytesIO()
        picture.save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        yield {"messages": [{"role": "user", "content": parts}], "max_tokens": _ANSWER_TOKENS}


def _answering(model: Any) -> Any:
    """Let a random model write words only, and never end its answer."""
    model.config.image_token_id = VOCABULARY.index("<image>")
    special = [index for index, word in enumerate(VOCABULARY) if word.startswith("<")]
    model.generation_config.update(eos_token_id=None, pad_token_id=0, suppress_tokens=special)
    return model


def _processor(shape: SubjectShape) -> Any:
    """The embedded model's processor, for pictures of the model's size."""
    processor = build_processor()
    side = shape.image_side * 14
    processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    processor.patch_size = 14
    processor.tokenizer.model_max_length = 4096
    return processor

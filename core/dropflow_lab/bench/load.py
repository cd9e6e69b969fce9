"""Asks a server from several clients at once, each over a connection of its own; a program that needs only Python.

It reads a JSON object on stdin, with the fields of `Load`, and writes one on stdout, with those of `Burst`. It runs in
a process of its own, so that the clients take no turns with the model's Python.
"""

from __future__ import annotations

import http.client
import itertools
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Load:
    """What is asked of a server on this machine."""

    port: int
    bodies: list[dict[str, Any]]
    """Chat requests, without `model` and `stream`; asked in turn."""
    model: str
    clients: int
    requests: int
    """Requests of all clients together; each client asks its next one when it has its answer."""


@dataclass
class Burst:
    """What the clients saw."""

    seconds: float = 0.0
    """From the first request to the end of the last answer."""
    first: list[float] = field(default_factory=list)
    """Seconds from each request to the first text of its answer."""
    token: list[float] = field(default_factory=list)
    """Seconds per further token, of each answer with more than one."""
    tokens: int = 0
    """Tokens of all answers."""
    server_cpu: float = 0.0
    """CPU seconds of the server's process per request; filled in by whoever can see it."""
    failed: list[str] = field(default_factory=list)
    """What went wrong, for each request without an answer."""


def run(load: Load) -> Burst:
    """Ask, and return what was seen."""
    burst, numbers, lock = Burst(), itertools.count(), threading.Lock()
    start = threading.Barrier(load.clients + 1)

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", load.port, timeout=600)
        start.wait()
        while (number := next(numbers)) < load.requests:
            try:
                first, last, tokens = _ask(connection, load.model, load.bodies[number % len(load.bodies)])
            except (OSError, http.client.HTTPException, ValueError) as error:
                with lock:
                    burst.failed.append(f"{type(error).__name__}: {error}")
                connection.close()
                continue
            with lock:
                burst.first.append(first)
                burst.tokens += tokens
                if tokens > 1:
                    burst.token.append((last - first) / (tokens - 1))
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(load.clients)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    burst.seconds = time.perf_counter() - began
    return burst


def _ask(connection: http.client.HTTPConnection, model: str, body: dict[str, Any]) -> tuple[float, float, int]:
    """Return seconds to the first text and to the end of an answer, and its tokens; raises `ValueError` without one."""
    asked = body | {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps(asked)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    first = last = None
    tokens = 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        told = json.loads(line[6:])
        if "error" in told:
            raise ValueError(told["error"]["message"])
        choices = told["choices"]
        if choices and choices[0]["delta"].get("content"):
            first = first or time.perf_counter() - began
        if choices and choices[0]["finish_reason"]:
            last = time.perf_counter() - began
        if told.get("usage"):
            tokens = told["usage"]["completion_tokens"]
    if first is None or last is None:
        raise ValueError(f"no answer, status {response.status}")
    return first, last, tokens


if __name__ == "__main__":
    json.dump(asdict(run(Load(**json.load(sys.stdin)))), sys.stdout)

"""The parts of a running server: who is inside, what is prepared, what waits, and how it all stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from dropflow_lab.inputs.prompts import Conversation
from dropflow_lab.serve.api_error import ApiError, stopping
from dropflow_lab.serve.chat import ChatRequest, read_request
from dropflow_lab.serve.conversation import open_conversation
from dropflow_lab.serve.keys import Keys
from dropflow_lab.serve.limits import Limits
from dropflow_lab.serve.line import Line
from dropflow_lab.serve.metrics import Metrics
from dropflow_lab.serve.names import Names
from dropflow_lab.serve.prompt import Prompt, prepare
from dropflow_lab.serve.reuse import Reuse
from dropflow_lab.serve.uploads import Uploads
from dropflow_lab.serve.waiting import Choice, Told, Waiting
from dropflow_lab.serve.worker import Answers, Worker

_OPEN = 4
"""Requests whose pictures are open at once: a small body may hold pictures of `Limits.pixels` each."""

Events = asyncio.Queue[Told | None]
"""What a request is told; `None` when its client has left."""


class Service:
    """Everything that the requests of one server share; used in one event loop."""

    def __init__(
        self, processor: Any, answers: Answers, reuse: Reuse, names: Names, limits: Limits, keys: Keys, context: int
    ) -> None:
        """`context` is the number of positions that the model has for prompt and answer."""
        self.names, self.limits, self.keys = names, limits, keys
        self.uploads = Uploads(limits.upload_bytes, limits.upload_seconds)
        self.line = Line(limits.batch, limits.wait)
        self.metrics = Metrics(lambda: self._inside, self.line.__len__)
        self.metrics.follow(reuse, names)
        self.worker = Worker(self.line, answers, lambda batch: self.metrics.batch(names.full(batch[0].policy), batch))
        self.created = int(time.time())
        self.stopping = False
        self._processor, self._reuse, self._context = processor, reuse, context
        self._inside = 0
        self._told: set[Waiting] = set()
        self._opening = ThreadPoolExecutor(_OPEN, "dropflow-open")
        self._opened = asyncio.Semaphore(_OPEN)
        # one thread, because processors and tokenizers are not made for several
        self._preparing = ThreadPoolExecutor(1, "dropflow-prepare")

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""
        return self.worker.is_alive() and not self.stopping

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A request is inside the server; raises `ApiError` (503) if there are too many, or if it is stopping."""
        if not self.healthy:
            raise stopping()
        if self._inside >= self.limits.queue:
            raise ApiError(
                503, "overloaded", f"{self.limits.queue} requests are waiting or being answered; try again shortly"
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @contextmanager
    def waiting(self, request: Waiting) -> Iterator[None]:
        """Put a request in line; when the block ends, however it ends, the request is not answered any further."""
        if not self.line.put(request):
            raise stopping()
        self._told.add(request)
        try:
            yield
        finally:
            request.cancelled = True
            self._told.discard(request)

    async def read(self, body: bytes, owner: str, events: Events) -> tuple[ChatRequest, Waiting]:
        """Return the request in a body, and the same ready to be put in line; raises `ApiError` if it is refused."""
        loop = asyncio.get_running_loop()

        def hand_on(told: Told) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(events.put_nowait, told)

        def opened() -> tuple[ChatRequest, str, Conversation]:
            request = read_request(body)
            policy = self.names.policy(request.model)
            return request, policy, open_conversation(request.messages, owner, self.uploads, self.limits)

        with self.line.expecting():
            async with self._opened:
                request, policy, conversation = await loop.run_in_executor(self._opening, opened)
                prompt, beginning = await loop.run_in_executor(
                    self._preparing, self._prepared, conversation, policy, owner
                )
            return request, Waiting(prompt, policy, self._choice(request, prompt.tokens), hand_on, beginning)

    def _prepared(self, conversation: Conversation, policy: str, owner: str) -> tuple[Prompt, str | None]:
        prompt = prepare(self._processor, conversation, self._context)
        return prompt, self._reuse.digest(prompt, policy, owner)

    def _choice(self, request: ChatRequest, prompt: int) -> Choice:
        most, room = self.limits.answer_tokens, self._context - prompt
        asked = request.asked_tokens
        if asked is not None and asked > min(most, room):
            why = f"answers have up to {most:,} tokens here"
            if room < most:
                why = f"{self._context:,} tokens hold prompt and answer, and the prompt has {prompt:,}"
            raise ApiError(
                400,
                "context_length_exceeded",
                f"max_tokens: expected up to {min(most, room):,}, got {asked:,}: {why}",
                "max_tokens",
            )
        return Choice(
            min(most, room) if asked is None else asked,
            request.temperature or 0.0,
            1.0 if request.top_p is None else request.top_p,
            request.seed,
            tuple(request.stop),
        )

    async def stop(self) -> None:
        """Let nobody in any more, let the others finish within `limits.grace` seconds, and end the rest with 503."""
        self.stopping = True
        until = time.monotonic() + self.limits.grace
        while self._inside and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for request in list(self._told):
            request.tell(stopping())
            request.cancelled = True
        self.line.close()

    def close(self) -> None:
        """Wait for the model's thread and for what is being prepared; called when the event loop is over."""
        self.line.close()
        self.worker.join()
        self._opening.shutdown()
        self._preparing.shutdown()

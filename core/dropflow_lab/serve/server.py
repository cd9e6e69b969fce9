"""Runs the server: a socket, an event loop, and the model's thread."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from PIL import Image

import dropflow
from dropflow_lab.errors import InputError
from dropflow_lab.serve.api_error import ApiError
from dropflow_lab.serve.app import build_app
from dropflow_lab.serve.batch import Answering
from dropflow_lab.serve.keys import Keys
from dropflow_lab.serve.limits import Limits
from dropflow_lab.serve.names import Names
from dropflow_lab.serve.prompt import prepare
from dropflow_lab.serve.reuse import Reuse
from dropflow_lab.serve.service import Service
from dropflow_lab.serve.waiting import Choice, Told, Waiting

_LONGEST_CONTEXT = 2**20
"""Tokens of prompt and answer where a model's config does not bound them."""


class Server:
    """One model on one address, from the moment that it listens."""

    def __init__(self, model: Any, processor: Any, names: Names, limits: Limits, keys: Keys, host: str, port: int):
        """Attach the policies, try each once, and listen; port 0 takes a free one.

        Raises what attaching raises, and `InputError` for an address that cannot be listened on, or a model that cannot
        answer a question about a picture.
        """
        self._socket = _listening(host, port)
        try:
            self._flows = dropflow.attach_set(model, names.policies, default=names.default)
            try:
                reuse = Reuse(model, self._flows, limits.prefix_bytes)
                answers = Answering(model, processor, self._flows, reuse)
                context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST_CONTEXT
                for policy in names.policies:
                    _try(answers, processor, policy, context)
                self._service = Service(processor, answers, reuse, names, limits, keys, context)
            except BaseException:
                self._flows.detach()
                raise
        except BaseException:
            self._socket.close()
            raise
        config = uvicorn.Config(
            build_app(self._service),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(limits.grace) + 2,
        )
        self._uvicorn = uvicorn.Server(config)

    @property
    def port(self) -> int:
        """Port that the server listens on."""
        return int(self._socket.getsockname()[1])

    def stop(self) -> None:
        """Ask the server to stop; may be called from any thread."""
        self._uvicorn.should_exit = True

    def run(self, announce: Callable[[], None] | None = None) -> None:
        """Answer requests until `stop` is called or, in the main thread, until SIGINT or SIGTERM comes.

        `announce` is called when either would stop it. Requests that are inside then have `Limits.grace` seconds; a
        second SIGINT ends them at once. The policies are detached at the end. Raises what ended the model's thread, if
        anything did.
        """
        self._service.worker.start()
        try:
            with _stopped_by_signals(self.stop):
                if announce is not None:
                    announce()
                asyncio.run(self._serve())
        finally:
            self._socket.close()
            self._service.close()
            self._flows.detach()
        if self._service.worker.failure is not None:
            raise self._service.worker.failure

    async def _serve(self) -> None:
        stopping = asyncio.create_task(self._stop_service())
        await self._uvicorn.serve(sockets=[self._socket])
        stopping.cancel()

    async def _stop_service(self) -> None:
        while not self._uvicorn.should_exit and self._service.worker.is_alive():
            await asyncio.sleep(0.02)
        self._uvicorn.should_exit = True
        await self._service.stop()


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Run a server in a thread of its own until the block ends."""
    thread = threading.Thread(target=server.run, name="dropflow-server")
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--host, --port: cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}; name "
            "another address, or port 0 for a free port"
        ) from None


def _try(answers: Answering, processor: Any, policy: str, context: int) -> None:
    """Answer one question about a grey picture, so that a policy or model that cannot run fails before it is served."""
    told: list[Told] = []
    picture = Image.new("RGB", (224, 224), "grey")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    try:
        prompt = prepare(processor, [{"role": "user", "content": parts}], context)
    except ApiError as error:
        raise InputError(
            f"the model cannot be asked about a picture: {error.message}; `dropflow run` helps to find out why"
        ) from None
    answers.answer([Waiting(prompt, policy, Choice(2), told.append)])


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` for signals that come before uvicorn handles them, and for those it raises again when it has ended.

    Applies to the main thread alone, which is the one that gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, lambda *_: stop()) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)

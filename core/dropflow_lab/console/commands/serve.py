"""`dropflow serve`: a model under one or several policies, behind OpenAI's chat API."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from dropflow_lab.console.commands.options import ModelArgument, Overrides
from dropflow_lab.console.commands.output import chatter_to_stderr

_NEEDED = ("starlette", "uvicorn", "python_multipart", "prometheus_client")
_MIB = 2**20
_DAY = 86_400
"""The longest of all times, in seconds: clocks and locks take no infinite ones."""


def serve(
    model: ModelArgument = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME_OR_PATH",
            help="Policy to serve under, by default the one that the model records; may be given several times.",
        ),
    ] = None,
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model for clients; by default that of its folder.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="API keys, one per line; DROPFLOW_API_KEY in the environment is one, too."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are answered at once, at most.")] = 8,
    wait: Annotated[
        float, typer.Option(min=0, max=_DAY, help="Seconds that a batch waits for requests that are being prepared.")
    ] = 0.01,
    queue: Annotated[int, typer.Option(min=1, help="Requests in the server, at most.")] = 64,
    timeout: Annotated[
        float, typer.Option(min=0.001, max=_DAY, help="Seconds for a request, until its answer has ended.")
    ] = 120,
    body_timeout: Annotated[
        float, typer.Option(min=0.001, max=_DAY, help="Seconds for the body of a request to arrive.")
    ] = 30,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request's body.")] = 20,
    max_images: Annotated[int, typer.Option(min=0, help="Pictures in a request.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a picture.")] = 20_000_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    max_uploads: Annotated[
        int, typer.Option(min=0, help="MiB of all uploaded files, which are kept for an hour.")
    ] = 256,
    prefix_memory: Annotated[
        int, typer.Option(min=0, help="MiB for what requests about the same pictures share; 0 asks each anew.")
    ] = 256,
    fetch_from: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Host that pictures may be fetched from; by default none is."),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, max=_DAY, help="Seconds for requests to finish when the server stops.")
    ] = 30,
) -> None:
    """Serve a model through OpenAI's chat API, under several policies that clients choose by the model's name.

    `NAME@POLICY` names a policy, `NAME@dense` none, and `NAME` alone the first one. Requests are batched across
    clients, never across policies. Without a folder, the embedded model is served as `digits`.
    """
    require_serve()
    from dropflow import load_policy
    from dropflow.policy.recorded import FIELD
    from dropflow_lab.inputs.models import load_model, policy_of
    from dropflow_lab.serve.keys import Keys
    from dropflow_lab.serve.limits import Limits
    from dropflow_lab.serve.names import Names
    from dropflow_lab.serve.server import Server

    limits = Limits(
        batch, wait, queue, timeout, body_timeout, max_body * _MIB, max_images, max_pixels, max_tokens,
        upload_bytes=max_uploads * _MIB, prefix_bytes=prefix_memory * _MIB, grace=grace,
        hosts=frozenset(map(str.lower, fetch_from or ())),
    )  # fmt: skip
    with chatter_to_stderr():
        keys = Keys.read(api_keys)
        chosen = [load_policy(policy, overrides or ()) for policy in policies or ()]
        served = name or ("digits" if model is None else model.resolve().name if model.is_dir() else str(model))
        loaded, processor = load_model(model)
        if not chosen and getattr(loaded.config, FIELD, None) is not None:
            chosen = [policy_of(loaded, overrides or ())]
        names = Names.of(served, chosen)
        server = Server(loaded, processor, names, limits, keys, host, port)
    shown = f"[{host}]" if ":" in host else host
    told = f"serving {', '.join(names.all)}\nat http://{shown}:{server.port}/v1{_open_to_all(host, bool(keys))}"
    server.run(lambda: typer.echo(told))


def require_serve() -> None:
    """Raise `InputError` if a package that the server stands on is not installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        from dropflow_lab.errors import InputError

        raise InputError(f"the server needs {', '.join(missing)}: pip install 'dropflow[serve]'")


def _open_to_all(host: str, has_keys: bool) -> str:
    local = host in ("localhost", "::1") or host.startswith("127.")
    return "" if local or has_keys else ", without an API key: whoever reaches this address may use it"

"""`dropflow bench serve`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands.options import AsJson, Threads
from dropflow_lab.console.commands.output import chatter_to_stderr, emit
from dropflow_lab.console.commands.serve import require_serve

if TYPE_CHECKING:
    from dropflow_lab.bench.serve import ServeBench, ServeRow
    from dropflow_lab.measure.timing import Spread

_QUICK_ROUNDS = 2
_COLUMNS = (
    "clients",
    "policy",
    "requests/s",
    "gain",
    "CPU ms per request",
    "gain in CPU time",
    "first token, ms",
    "per token, ms",
)


class Subject(StrEnum):
    """Served models."""

    digits = "digits"
    bench = "bench"
    tiny = "tiny"


def serve(
    subject: Annotated[
        Subject, typer.Option(help="digits: the embedded model; bench: random, 16 layers, d=512; tiny: a smoke test.")
    ] = Subject.digits,
    policies: Annotated[
        str | None, typer.Option(metavar="A,B", help="Policies next to dense; by default two that fit the model.")
    ] = None,
    clients: Annotated[str, typer.Option(metavar="N,N", help="Numbers of clients that ask at once.")] = "1,8,32",
    requests: Annotated[int, typer.Option(min=1, help="Requests of each client in a round.")] = 4,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds; everything is measured once in each.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Requests that the server answers at once, at most.")] = 8,
    threads: Threads = 1,
    quick: Annotated[bool, typer.Option("--quick", help=f"{_QUICK_ROUNDS} rounds: a smoke test.")] = False,
    into: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also renew the table between `<!-- SUBJECT -->` and its end in a document."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model, ask it from several clients at once, dense and under policies in turn, and time what they see.

    `gain` is the ratio of requests per second to dense in the same round; all are medians with quartiles over the
    rounds. CPU time is that of the server's process. Clients run in a process of their own and ask their next question
    when they have an answer.
    """
    require_serve()
    from dropflow_lab.bench.serve import bench_serve
    from dropflow_lab.markdown import around, renew, table

    default = "hidrop-digits,mustdrop-digits" if subject is Subject.digits else "hidrop-64,divprune-56"
    with chatter_to_stderr():
        if into is not None:
            around(into, subject.value)  # before anything is measured
        measured = bench_serve(
            subject.value,
            [name.strip() for name in (policies or default).split(",")],
            clients=_numbers(clients),
            requests=requests,
            rounds=_QUICK_ROUNDS if quick else repeats,
            batch=batch,
            threads=threads,
        )
        shown = f"{table(_COLUMNS, map(_cells, measured.rows))}\n\n{_circumstances(measured)}"
        if into is not None:
            renew(into, subject.value, shown)
    emit(measured.to_json(), as_json, shown)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part[:6]) <= 1024 for part in parts):
        raise typer.BadParameter(f"expected numbers from 1 to 1024, such as 1,8,32, got {text!r}", param_hint="clients")
    return sorted({int(part) for part in parts})


def _cells(row: ServeRow) -> tuple[str, ...]:
    return (
        str(row.clients),
        row.policy,
        _spread(row.requests_per_second, 2),
        _spread(row.gain, 2),
        _spread(row.cpu_seconds.over(1e-3), 0),
        _spread(row.cpu_gain, 2),
        _spread(row.first_token_seconds.over(1e-3), 0),
        _spread(row.token_seconds.over(1e-3), 1),
    )


def _spread(spread: Spread, places: int) -> str:
    return f"{spread.median:.{places}f} [{spread.low:.{places}f} .. {spread.high:.{places}f}]"


def _circumstances(measured: ServeBench) -> str:
    machine = measured.machine
    return (
        f"{_kept(measured)}{measured.rounds} rounds, batches of up to {measured.batch}, {machine.threads} thread(s) of "
        f"{machine.cpu}; torch {machine.torch}, transformers {machine.transformers}."
    )


def _kept(measured: ServeBench) -> str:
    """How gains change with the number of clients, if there are several numbers."""
    dense, fewest = measured.rows[0].policy, measured.rows[0].clients
    shares = {row.policy: measured.kept(row.policy) for row in measured.rows if row.policy != dense}
    told = [
        f"{policy} " + ", ".join(f"{share:.2f} at {clients}" for clients, share in found.items() if clients != fewest)
        for policy, found in shares.items()
        if len(found) > 1
    ]
    return f"Gain in CPU time over that with {fewest} client(s): {'; '.join(told)}. " if told else ""

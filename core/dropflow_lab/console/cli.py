"""The command line, `dropflow`: one module of `commands` per command, engine and models imported only when one runs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from dropflow_lab.console.commands import (
    bench,
    check,
    compare,
    digits,
    explain,
    list_names,
    profile,
    run,
    schema,
    serve,
    trace,
    train,
    tune,
)
from dropflow_lab.console.one_line_errors import OneLineErrors

app = typer.Typer(cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False)
app.command("run")(run.run)
app.command("trace")(trace.trace)
app.command("compare")(compare.compare)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("explain")(explain.explain)
app.command("check")(check.check)
app.command("list")(list_names.list_names)
app.command("schema")(schema.schema)
app.command("profile")(profile.profile)
app.command("tune")(tune.tune)
app.add_typer(digits.app, name="digits")
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Reduce visual tokens in multimodal LLMs: run, explain, check and measure token-flow policies."""
    if show_version:
        typer.echo(f"dropflow {version('dropflow')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())

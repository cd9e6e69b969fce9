"""`dropflow schema`: the JSON Schema of policy files, for editors, or of trace files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dropflow_lab.console.commands.options import AsJson
from dropflow_lab.console.commands.output import chatter_to_stderr, emit
from dropflow_lab.files import write_text


def schema(
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the schema to this file instead of stdout.")
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Print the schema of trace files instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the JSON Schema of a policy file, with the options of every installed stage.

    With `# yaml-language-server: $schema=FILE` at the top of a policy, editors complete and check it.
    """
    from dropflow.policy.policy import schema as policy_schema

    with chatter_to_stderr():
        described = _trace_schema() if trace else policy_schema()
        if out is not None:
            write_text(out, json.dumps(described, indent=2) + "\n")
    if out is None:
        emit(described, True)
    else:
        emit({"out": str(out)}, as_json, f"wrote {out}")


def _trace_schema() -> dict[str, Any]:
    from dropflow_lab.trace import Trace

    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Trace.model_json_schema()

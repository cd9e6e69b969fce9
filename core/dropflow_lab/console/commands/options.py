"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PolicyArgument = Annotated[str, typer.Argument(metavar="POLICY", help="Registered name, or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override one entry of the policy; may be given several times."),
]
Layers = Annotated[int | None, typer.Option(min=1, help="Decoder layers of the backbone.")]
VisualTokens = Annotated[int | None, typer.Option(min=1, help="Visual tokens of one image at entry to the LLM.")]
_MODEL = "Local model folder; by default the embedded model."
ModelArgument = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help=_MODEL)]
ModelOption = Annotated[Path | None, typer.Option(metavar="DIR", help=_MODEL)]
Data = Annotated[
    str,
    typer.Option(
        metavar="digits|clips|DIR",
        help="The embedded questions about pictures or videos, or a folder with images/ or videos/ and a .jsonl file.",
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]

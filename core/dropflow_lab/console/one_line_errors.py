"""Bad input ends a command with exit code 2 and a line on stderr; a traceback always means a bug."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import typer
from typer.core import TyperGroup

# typer 0.29 moved click's classes to private names; the base of BadParameter is UsageError before and after
_UsageError: Any = typer.BadParameter.__base__

_LONGEST_LINE = 1_000
"""Most characters printed of one fault."""


class OneLineErrors(TyperGroup):
    """The root command; prints one line per fault and exits with 2 on bad input."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit the process; with `standalone_mode` off, raise and return instead."""
        run = partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except _UsageError as error:
            command = error.ctx.command_path if error.ctx else "dropflow"
            message = " ".join(error.format_message().split()).replace("Value error, ", "")  # choices come in lines
            _complain(f"{message.rstrip('.')} (see {command} --help)")
            code = 2
        except typer.Abort:
            code = 130
        except Exception as error:
            if not _is_bad_input(error):
                raise
            _complain(_text(error))
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> None:
    from dropflow.errors import escaped

    for line in message.split("\n"):
        if line.strip():
            print(f"error: {escaped(line, _LONGEST_LINE)}", file=sys.stderr)


def _text(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, OSError) and error.filename is not None:  # a file that cannot be read or written
        return True
    if isinstance(error, FileExistsError):
        return True
    from dropflow.errors import DropflowError

    return isinstance(error, DropflowError)

"""Errors end a run of lmms-eval with exit code 1."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from dropflow.errors import DropflowError


@contextmanager
def ending_the_run() -> Iterator[None]:
    """Let errors inside the block end the process with exit code 1 where lmms-eval's command line runs.

    lmms-eval 0.7.3 catches every `Exception` there, logs it and ends with exit code 0 (`cli_evaluate`), so that scripts
    take a failed run for a finished one. Elsewhere, as in `lmms_eval.simple_evaluate`, errors are passed on.
    """
    try:
        yield
    except Exception as error:
        if "lmms_eval.__main__" not in sys.modules:
            raise
        if not isinstance(error, DropflowError):
            traceback.print_exc()
        raise SystemExit(f"error: {error}") from error

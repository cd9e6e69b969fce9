"""Finished measurements on disk, one JSON file each: an interrupted run continues, and several processes share one."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dropflow_lab.errors import shortened
from dropflow_lab.files import file_name, write_text
from dropflow_lab.store.claims import claimed

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """A folder of finished measurements; file names are derived from what was measured and on what."""

    folder: Path

    def once(
        self,
        name: str,
        facts: Mapping[str, Any],
        measure: Callable[[], T],
        parse: Callable[[Any], T],
        plain: Callable[[T], Any],
    ) -> T:
        """Return the measurement under these facts, which this process makes if no process has.

        `plain` turns it into plain data, and `parse` back. Raises `claims.Taken` if another process is measuring it.
        """
        found: T | None = self.read(name, facts, parse)
        if found is not None:
            return found
        with claimed(self._path(name, facts).with_suffix(".lock")):
            found = self.read(name, facts, parse)  # by a process that has just released the lock
            if found is None:
                found = measure()
                self.write(name, facts, plain(found))
            return found

    def read(self, name: str, facts: Mapping[str, Any], parse: Callable[[Any], Any] = lambda found: found) -> Any:
        """Return the measurement under these facts, converted from plain data by `parse`, or `None` if there is none.

        A file that is damaged, or that `parse` rejects with `ValueError`, is reported on stderr and counts as none.
        """
        path = self._path(name, facts)
        if not path.is_file():
            return None
        try:
            return parse(json.loads(path.read_text(encoding="utf-8"))["measured"])
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            print(f"{path}: damaged, measuring again: {shortened(str(error))}", file=sys.stderr)
            return None

    def write(self, name: str, facts: Mapping[str, Any], measured: Any) -> None:
        """Write atomically, so that a killed run leaves no partial file."""
        write_text(self._path(name, facts), json.dumps({"measured": measured, "facts": facts}, indent=2))

    def _path(self, name: str, facts: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{file_name(name)}-{digest}.json"

"""The policy in a model's config: saved with the model, and read back by `attach` when it is given none."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from dropflow.errors import PolicyError, quoted
from dropflow.policy.bounds import bounded
from dropflow.policy.policy import Policy
from dropflow.policy.policy_file import load_policy, load_recorded

FIELD = "dropflow"
"""Field of a model's config that holds its policy, as JSON with the keys of a YAML policy file."""
WEIGHTS = "dropflow.safetensors"
"""File beside the model's own weights with those of the modules that the policy's stages train."""


def recorded_policy(config: Any, *, allow_downloads: bool = False) -> Policy:
    """Read the policy recorded in a model's config.

    Options that name a model accept only local folders, unless `allow_downloads`. Raises `PolicyError` where there is
    none, or where it uses a stage that is not installed here.
    """
    found = getattr(config, FIELD, None)
    if found is None:
        raise PolicyError(
            f"attach: no policy is given, and none is recorded in this model's config (`config.{FIELD}`); pass a name, "
            "a path, a mapping or a Policy. Models saved while a policy is attached record it"
        )
    try:
        recorded = bounded(found if isinstance(found, Mapping) else {"stages": found}, f"config.{FIELD}")
        return load_recorded(_as_said(recorded), allow_downloads=allow_downloads)
    except PolicyError as error:
        whole = f"config.{FIELD}:"
        lines = [line if line.startswith(whole) else f"config.{FIELD}.{line}" for line in str(error).split("\n")]
        remedy = "pass another policy to `attach`, or install the package that a stage is missing from"
        raise PolicyError("\n".join([*lines, remedy])) from None


def note_dense(config: Any) -> None:
    """Log a warning when a model runs without a policy although its config records one."""
    found = getattr(config, FIELD, None)
    if found is not None:
        name = found.get("name") if isinstance(found, Mapping) else None
        logging.getLogger("dropflow").warning(
            "this model runs dense, though its config records the policy %s; dropflow.attach(model) applies it",
            quoted(name),
        )


class Recording:
    """Holds one model's policy in its `config` until `remove` restores the previous content, or for good after `keep`.

    Recordings of several models that share one config object may be removed in any order: the config shows the latest
    one that is left.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._token = object()

    def put(self, policy: Policy) -> None:
        """Write `policy` into the config."""
        present = getattr(self._config, FIELD, None)
        entry = present if isinstance(present, _Entry) else _Entry(present)
        entry.stack.append((self._token, to_jsonable_python(policy.to_dict(), fallback=repr)))
        entry.show()
        setattr(self._config, FIELD, entry)

    def keep(self, policy: Policy) -> None:
        """Let `policy`, which `put` has written, stay in the config after `remove`.

        Raises `PolicyError` if it could not be read back.
        """
        present = getattr(self._config, FIELD, None)
        stack = present.stack if isinstance(present, _Entry) else []
        own = [said for token, said in stack if token is self._token]
        if present is None or not own:
            raise PolicyError(f"record: `config.{FIELD}` was replaced after attaching, so there is nothing to keep")
        try:
            same = load_policy(_as_said(own[0])) == policy
        except PolicyError as error:
            raise PolicyError(
                f"{error}\nrecord: a recorded policy names its stages, so register them as entry points of a package"
            ) from None
        if not same:
            raise PolicyError(
                f"record: the policy {policy.name!r} is a different one when read back from JSON; use options that are "
                "plain data, and no text that looks like a number as a key"
            )
        present.before = own[0]

    def remove(self) -> None:
        """Restore what the config held before; a second call does nothing."""
        present = getattr(self._config, FIELD, None)
        if not isinstance(present, _Entry):
            return
        present.stack = [(token, said) for token, said in present.stack if token is not self._token]
        present.show()
        if present.stack:
            return
        if present.before is None:
            delattr(self._config, FIELD)
        else:
            setattr(self._config, FIELD, present.before)


class _Entry(dict[str, Any]):
    """What the config holds while policies are attached: the latest one of a stack."""

    def __init__(self, before: Any = None) -> None:
        super().__init__()
        self.before = before
        """What the config held when nothing was attached."""
        self.stack: list[tuple[object, dict[str, Any]]] = []
        """Token and policy of each recording, the latest last."""

    def show(self) -> None:
        """Hold the latest policy."""
        self.clear()
        self.update(self.stack[-1][1] if self.stack else {})


def _as_said(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Turn option keys such as "10" back into numbers: JSON has only text as keys."""
    stages = recorded.get("stages")
    if not isinstance(stages, Mapping):
        return dict(recorded)
    return {**recorded, "stages": {name: _with_numbers(entry) for name, entry in stages.items()}}


def _with_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_number(key): _with_numbers(item) for key, item in value.items()}
    return [_with_numbers(item) for item in value] if isinstance(value, list) else value


def _number(key: Any) -> Any:
    for kind in (int, float):
        try:
            return kind(key) if isinstance(key, str) and _NUMBER.fullmatch(key) else key
        except ValueError:
            continue
    return key


_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")
"""What JSON writes for a number that was a key."""

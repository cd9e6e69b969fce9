"""The policy in a model's config: saved with the model, and read back by `attach` when it is given none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from dropflow.errors import PolicyError
from dropflow.policy.policy import Policy
from dropflow.policy.policy_file import load_policy

FIELD = "dropflow"
"""Field of a model's config that holds its policy, as the mapping a YAML file would say, in JSON."""


def recorded_policy(config: Any) -> Policy:
    """Read the policy that a model's config has recorded.

    Raises `PolicyError` where there is none, or where it uses a stage that is not installed here.
    """
    found = getattr(config, FIELD, None)
    if found is None:
        raise PolicyError(
            f"attach: no policy is given, and none is recorded in this model's config (`config.{FIELD}`); pass a name, "
            "a path, a mapping or a Policy. Models saved while a policy is attached record it"
        )
    try:
        return load_policy(_with_numbers(found) if isinstance(found, Mapping) else {"stages": found})
    except PolicyError as error:
        lines = [f"config.{FIELD}.{line}" for line in str(error).splitlines()]
        remedy = "install the package this policy's stages come from, or pass another policy to `attach`"
        raise PolicyError("\n".join([*lines, remedy])) from None


class Recording:
    """The policy stands in `config` until `remove`, which puts back what was there; or for good, after `keep`.

    Recordings of several models that share one config object may be removed in any order.
    """

    def __init__(self, config: Any, policy: Policy) -> None:
        self._config, self._policy = config, policy
        self._own = _Entry(to_jsonable_python(policy.to_dict(), fallback=repr))
        self._own.before = getattr(config, FIELD, None)
        setattr(config, FIELD, self._own)

    def keep(self) -> None:
        """Leave the policy in the config after `remove`; raises `PolicyError` where it could not be read back."""
        entry = dict(self._own)
        try:
            same = load_policy(_with_numbers(entry)) == self._policy
        except PolicyError as error:
            raise PolicyError(
                f"{error}\nrecord: a recorded policy names its stages, so register them as entry points of a package"
            ) from None
        if not same:
            raise PolicyError(
                f"record: the policy {self._policy.name!r} reads back from JSON as another one; use options that are "
                "plain data, and no text that looks like a number as a key"
            )
        self._own.before = entry

    def remove(self) -> None:
        """Put back what the config held before; harmless when done before."""
        present = getattr(self._config, FIELD, None)
        if present is self._own:
            if self._own.before is None:
                delattr(self._config, FIELD)
            else:
                setattr(self._config, FIELD, self._own.before)
        while isinstance(present, _Entry):
            if present.before is self._own:
                present.before = self._own.before
            present = present.before


class _Entry(dict[str, Any]):
    """A recorded policy that knows what stood in its place."""

    before: Any = None


def _with_numbers(value: Any) -> Any:
    """Turn keys such as "10" back into numbers: JSON has only text as keys."""
    if isinstance(value, Mapping):
        return {_number(key): _with_numbers(item) for key, item in value.items()}
    return [_with_numbers(item) for item in value] if isinstance(value, list) else value


def _number(key: Any) -> Any:
    try:
        number = yaml.safe_load(key) if isinstance(key, str) else key
    except yaml.YAMLError:
        return key
    return number if isinstance(number, int | float) and not isinstance(number, bool) else key

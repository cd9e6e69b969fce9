"""The names under which a model is served, `NAME@POLICY`, and the policies they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dropflow import Policy
from dropflow.errors import escaped, nearest
from dropflow_lab.errors import InputError
from dropflow_lab.serve.api_error import ApiError

DENSE = "dense"
"""Name that stands for no policy."""


@dataclass(frozen=True)
class Names:
    """One model's name, and the policies that it is served under."""

    model: str
    policies: Mapping[str, Policy | None]
    """By name; `DENSE` is always there, and stands for `None`."""
    default: str
    """Policy that the model's name alone stands for."""

    @classmethod
    def of(cls, model: str, policies: list[Policy]) -> Names:
        """Name the policies, of which the first is the default; without any, the default is dense.

        Raises `InputError` for a name that is given twice or stands for no policy.
        """
        if "@" in model or not model:
            raise InputError(f"--name: expected a name without '@', got {escaped(repr(model))}")
        named: dict[str, Policy | None] = {}
        for policy in policies:
            if policy.name == DENSE:
                raise InputError("--policy: the name 'dense' stands for no policy; give the policy another `name`")
            if policy.name in named:
                raise InputError(f"--policy: the name {policy.name!r} is given twice; leave one out, or rename it")
            named[policy.name] = policy
        return cls(model, named | {DENSE: None}, next(iter(named), DENSE))

    @property
    def all(self) -> list[str]:
        """Every name that a request may give, the default first."""
        return [self.model, *(f"{self.model}@{policy}" for policy in self.policies)]

    def policy(self, asked: str) -> str:
        """Return the policy that a request's `model` stands for; raises `ApiError` (404) for an unknown name."""
        if asked not in self.all:
            raise ApiError(
                404, "model_not_found", f"no model {escaped(repr(asked))} here; {nearest(asked, self.all)}", "model"
            )
        return asked.partition("@")[2] or self.default

    def full(self, policy: str) -> str:
        """Return the name with its policy."""
        return f"{self.model}@{policy}"

    def to_json(self, created: int) -> dict[str, Any]:
        """Return what `/v1/models` says, with the policy of each name; `created` is in seconds since the epoch."""
        told = {"object": "model", "created": created, "owned_by": "dropflow"}
        return {
            "object": "list",
            "data": [told | {"id": name, "policy": self.policy(name)} for name in self.all],
        }

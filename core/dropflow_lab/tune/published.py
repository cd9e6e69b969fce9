"""What the search starts from: the shipped policies, and the one that the layer profile leads to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import dropflow
from dropflow import Policy
from dropflow.errors import DropflowError
from dropflow.policy.registry import policy_files
from dropflow_lab.inputs.data import Sample
from dropflow_lab.profile import Knobs, Settings, policy_of, profile
from dropflow_lab.store.finished import Finished

PERSISTENT = "-persistent"
"""Ends the names of policies that publish compact positions and are tried with persistent ones, too."""


def published(names: Iterable[str] = ()) -> list[Policy]:
    """Return the shipped policies, or those named, each also with persistent positions where it publishes compact ones.

    Policies that cannot be read are left out where none is named.
    """
    chosen, found = list(names), list[Policy]()
    for name in chosen or sorted(policy_files()):
        try:
            policy = dropflow.load_policy(name)
        except DropflowError:
            if chosen:
                raise
            continue
        found.append(policy)
        if policy.positions == "compact":
            found.append(replace(policy, name=policy.name + PERSISTENT, positions="persistent"))
    return found


def profiled(
    model: Any, processor: Any, samples: Sequence[Sample], finished: Finished, settings: Settings, average: float
) -> Policy | None:
    """Return the policy that the layer profile chooses at this average, with vision from layer 0 on.

    Late entry is for models that are trained through the policy. `None` where the profile's boundaries cannot meet it.
    """
    knobs = Knobs(average_tokens=average, entry=0)
    try:
        return dropflow.load_policy(policy_of(profile(model, processor, samples, settings, knobs, finished)))
    except DropflowError:
        return None

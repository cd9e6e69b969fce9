"""Resolves names of policies and models to the rows of a comparison; finds refusals and duplicates beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dropflow
from dropflow import Policy
from dropflow.backbone.backbone import backbone_for
from dropflow.errors import DropflowError
from dropflow_lab.compare.rows import Title
from dropflow_lab.compare.same_plan import meaning
from dropflow_lab.inputs.models import policy_of

DENSE = "dense"
"""Name of the row without a policy."""
SEED = "{seed}"
"""Placeholder for the seeds 0, 1, ... in a row that is a mean over seeds."""

Models = Mapping[str, tuple[Any, Any]]
"""Model and processor by name or folder; "" is the shared model."""


@dataclass(frozen=True)
class Subject:
    """One row, or one seed of a row, by its requested names."""

    policy: str
    """Name or path; `DENSE` for none; empty for the one that the model records."""
    model: str = ""
    """Checkpoint name or folder; empty for the shared model."""

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Read `POLICY` or `POLICY@MODEL`."""
        policy, _, model = text.partition("@")
        return cls(policy.strip(), model.strip())

    def members(self, seeds: int) -> list[Subject]:
        """Return one subject per seed if a name contains the placeholder `SEED`, else just this one."""
        if SEED not in self.policy + self.model:
            return [self]
        return [
            Subject(self.policy.replace(SEED, str(seed)), self.model.replace(SEED, str(seed))) for seed in range(seeds)
        ]


@dataclass(frozen=True)
class Entry:
    """A row to be measured."""

    title: Title
    members: tuple[tuple[str, Policy | None], ...]
    """Model and policy of each seed; a single pair unless the row is a mean over seeds."""


@dataclass
class Lineup:
    """The rows to be measured, and the policies that were refused."""

    entries: list[Entry] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Policy (and model) -> why it does not fit."""


def subjects_of(texts: Iterable[str], models: Sequence[str] = ()) -> list[Subject]:
    """Return the row without a policy and those of `texts`, for the shared model or for each of `models`.

    A text that names its own model gives one row.
    """
    named = [Subject.parse(text) for text in texts]
    shared = [subject for subject in named if not subject.model]
    rows = [Subject(one.policy, model) for model in models or ("",) for one in (Subject(DENSE), *shared)]
    return list(dict.fromkeys([*rows, *(subject for subject in named if subject.model)]))


def load_models(subjects: Iterable[Subject], seeds: int, load: Callable[[str], tuple[Any, Any]]) -> Models:
    """Load every model that the rows need, once."""
    names = dict.fromkeys(member.model for subject in subjects for member in subject.members(seeds))
    return {name: load(name) for name in names}


def line_up(
    subjects: Sequence[Subject],
    models: Models,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 1,
    published: bool = True,
    persistent: bool = False,
) -> Lineup:
    """Load the policies and try each on its model; policies that are equivalent on a model share one row.

    `persistent` adds a row with persistent positions for every policy that publishes compact ones; without `published`
    it replaces the published row.
    """
    found = Lineup()
    first: dict[Any, int] = {}
    for subject in subjects:
        try:
            members = [(one.model, _policy(one, models, overrides)) for one in subject.members(seeds)]
            for entry in _variants(subject, members, published, persistent):
                scaled = [_scaled(models[model][0], policy) for model, policy in entry.members]
                titled = replace(entry, title=replace(entry.title, rescaled=any(scaled)))
                _add(found.entries, first, titled, models)
        except DropflowError as error:
            found.refused[subject.policy + f"@{subject.model}" * bool(subject.model)] = str(error)
    return found


def _policy(subject: Subject, models: Models, overrides: Sequence[str]) -> Policy | None:
    if subject.policy == DENSE:
        return None
    if not subject.policy:
        return policy_of(models[subject.model][0], overrides)
    return dropflow.load_policy(subject.policy, overrides)


def _variants(
    subject: Subject, members: Sequence[tuple[str, Policy | None]], published: bool, persistent: bool
) -> list[Entry]:
    """Return an entry as published and one with persistent positions, if requested and if they differ."""
    policy = members[0][1]
    name = DENSE if policy is None else policy.name if len(members) == 1 else subject.policy
    title = Title(name, subject.model)
    compact = any(one is not None and one.positions == "compact" for _, one in members)
    rows = [Entry(title, tuple(members))] if published or not compact else []
    if persistent and compact:
        kept = tuple((model, one and replace(one, positions="persistent")) for model, one in members)
        rows.append(Entry(replace(title, persistent=True), kept))
    return rows


def _scaled(model: Any, policy: Policy | None) -> bool:
    """Return whether the policy was tuned for another shape; attaches it briefly, since a backbone may refuse it."""
    if policy is None:
        return False
    with dropflow.attach(model, policy) as flow:
        tuned, shape = policy.tuned_for, flow.plan.shape
    return tuned is not None and (tuned.layers, tuned.visual_tokens) != (shape.layers, shape.visual_tokens)


def _add(entries: list[Entry], first: dict[Any, int], entry: Entry, models: Models) -> None:
    """Append an entry, or add its name to an equivalent one."""
    (model, policy), *others = entry.members
    if policy is not None and not others:
        key = model, meaning(policy, backbone_for(models[model][0]).shape)
        if key in first:
            same = entries[first[key]]
            also = (*same.title.also, entry.title.policy)
            entries[first[key]] = replace(same, title=replace(same.title, also=also))
            return
        first[key] = len(entries)
    entries.append(entry)

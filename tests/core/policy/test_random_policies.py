"""Whatever a policy says, it runs, or one of Dropflow's own errors says why not, soon and in one line."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_policies import damaged, random_policy, schemas, trial, use

import dropflow
from dropflow.policy import registry

OPTIONS = schemas()
BOUNDED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _with_warnings(recwarn: pytest.WarningsRecorder) -> None:
    """torch warns of odd windows and empty tensors, which is none of our errors."""


@BOUNDED
@given(chance=st.randoms(use_true_random=False))
def test_a_random_policy_runs_or_is_refused(llava: Any, chance: random.Random) -> None:
    policy = random_policy(chance, OPTIONS)
    assert trial(lambda: use(llava, policy)) in {"valid", "refused"}, policy


@BOUNDED
@given(chance=st.randoms(use_true_random=False))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, chance: random.Random) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert damaged_file(folder, chance) in {"valid", "refused"}, (folder / "damaged.yaml").read_bytes()


def damaged_file(folder: Path, chance: random.Random) -> str:
    """What becomes of a shipped policy after random edits."""
    shipped = chance.choice(sorted(registry.policy_files().values()))
    file = folder / "damaged.yaml"
    file.write_bytes(damaged(chance, shipped.read_text(encoding="utf-8")))
    return trial(lambda: dropflow.load_policy(file))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_policies_and_a_thousand_files(llava: Any, tmp_path: Path) -> None:
    policies: Counter[str] = Counter()
    for seed in range(10_000):
        policy = random_policy(random.Random(seed), OPTIONS)
        policies[trial(lambda which=policy: use(llava, which))] += 1
    files = Counter(damaged_file(tmp_path, random.Random(seed)) for seed in range(1_000))
    for kind, counts in (("policies", policies), ("files", files)):
        foreign = sum(count for said, count in counts.items() if "foreign" in said)
        slow = sum(count for said, count in counts.items() if said.startswith("over"))
        print(f"{kind}: {counts['valid']} valid, {counts['refused']} refused,", end=" ")
        print(f"{foreign} foreign exceptions, {slow} over one second")
    assert set(policies) | set(files) == {"valid", "refused"}

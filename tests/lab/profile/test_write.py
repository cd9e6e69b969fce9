"""The policy file that a profile's choice becomes."""

from __future__ import annotations

import dataclasses

from dropflow.policy.plan import resolve
from dropflow.policy.policy_file import load_policy
from dropflow.units import BackboneShape
from dropflow_lab.profile import Choice, Knobs, Profile, Settings, policy_of, policy_yaml
from dropflow_lab.profile.layers import LayerCurves
from dropflow_lab.profile.sweep import Quality

NOTHING = LayerCurves(100.0, {}, (), {})
PROFILE = Profile(
    layers=8,
    visual_tokens=100,
    images_differ=False,
    samples=3,
    settings=Settings(),
    knobs=Knobs(),
    curves=NOTHING,
    dense=Quality(1.0, 1.0, 0.0),
    exits=(),
    entries=(),
    choice=Choice(1, 6, {2: 40, 4: 5}, 23.75),
)


def test_the_policy_gives_the_tokens_that_were_chosen(tmp_path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(policy_yaml(PROFILE))
    schedule = resolve(load_policy(path), BackboneShape(8, 100)).schedule()
    assert schedule.per_layer == (0, 100, 40, 40, 5, 5, 0, 0)
    assert schedule.average == PROFILE.choice.average_visual_tokens


def test_keeps_are_shares_where_images_differ() -> None:
    varied = dataclasses.replace(PROFILE, images_differ=True)
    assert policy_of(varied)["stages"]["pyramid"]["keep"] == {2: 0.4, 4: 0.05}
    plan = resolve(load_policy(policy_of(varied)), BackboneShape(8, None))
    assert plan.schedule(200).per_layer == (0, 200, 80, 80, 10, 10, 0, 0)


def test_stages_that_would_do_nothing_are_left_out() -> None:
    whole = dataclasses.replace(PROFILE, choice=Choice(0, 8, {}, 100.0))
    assert policy_of(whole)["stages"] == {}

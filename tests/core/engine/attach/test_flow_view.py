"""How a flow and a set of flows are displayed."""

from __future__ import annotations

from typing import Any

from tiny import HIDROP, policy

import dropflow
from dropflow import Stage, StageOptions, hookimpl


class Named(StageOptions):
    text: str


class Hostile(Stage[Named]):
    Options = Named

    @hookimpl
    def exit(self, call: Any) -> None: ...


def test_a_flow_names_its_policy_its_model_and_its_stages(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP) as flow:
        stages = "inject: hidrop/late-injection, pyramid: hidrop/concave-pyramid, exit: hidrop/early-exit"
        assert repr(flow) == f"<Flow 'test' attached to llava of 6 layers; {stages}>"
        html = flow._repr_html_()
        assert "<tr><td>exit</td><td>hidrop/early-exit</td><td>at: 5, keep_last: False</td></tr>" in html
    assert repr(flow) == f"<Flow 'test' detached from llava of 6 layers; {stages}>"
    with dropflow.attach(llava.model, policy()) as flow:
        assert repr(flow) == "<Flow 'test' attached to llava of 6 layers; no stages>"


def test_texts_are_escaped_in_a_notebook(llava: Any) -> None:
    with dropflow.attach(llava, policy(bad={"use": Hostile, "text": "<script>&"})) as flow:
        html = flow._repr_html_()
    assert "<script>" not in html
    assert "<td>text: &lt;script&gt;&amp;</td>" in html


def test_a_set_names_its_policies_and_its_default(llava: Any) -> None:
    with dropflow.attach_set(llava, {"plain": None, "few": HIDROP}, default="few") as flows:
        assert repr(flows) == "<FlowSet attached to llava of 6 layers; plain: no policy, few: test; default few>"
        assert "<tr><td>few</td><td>test</td><td>yes</td></tr>" in flows._repr_html_()
        assert "<tr><td>plain</td><td>no policy</td><td></td></tr>" in flows._repr_html_()
    assert "detached from llava" in repr(flows)

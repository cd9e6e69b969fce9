"""How flows and sets of flows are displayed: as one line, and as a table in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dropflow.engine.decoder.html_table import html_table

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.engine.attach.flow import Flow, FlowSet
    from dropflow.policy.policy import StageUse


def line(flow: Flow, backbone: Backbone) -> str:
    """A flow in one line."""
    stages = ", ".join(f"{name}: {use.use}" for name, use in flow.policy.stages.items())
    return f"<Flow {flow.policy.name!r} {_where(flow, backbone)}; {stages or 'no stages'}>"


def html(flow: Flow, backbone: Backbone) -> str:
    """A table of the stages of a flow, with their options."""
    rows = [(name, use.use, _options(use)) for name, use in flow.policy.stages.items()]
    return html_table(f"Flow {flow.policy.name!r} {_where(flow, backbone)}", ("stage", "use", "options"), rows)


def set_line(flows: FlowSet, backbone: Backbone, default: str) -> str:
    """A set of flows in one line."""
    named = ", ".join(f"{name}: {policy}" for name, policy in _policies(flows))
    return f"<FlowSet {_where(flows, backbone)}; {named}; default {default}>"


def set_html(flows: FlowSet, backbone: Backbone, default: str) -> str:
    """A table of the flows of a set."""
    rows = [(name, policy, "yes" if name == default else "") for name, policy in _policies(flows)]
    return html_table(f"FlowSet {_where(flows, backbone)}", ("name", "policy", "default"), rows)


def _options(use: StageUse) -> str:
    return ", ".join(f"{name}: {value}" for name, value in use.options.model_dump(exclude_none=True).items())


def _policies(flows: FlowSet) -> list[tuple[str, str]]:
    """Each name in the set and its policy."""
    return [(name, "no policy" if flow is None else flow.policy.name) for name, flow in flows.items()]


def _where(flow: Flow | FlowSet, backbone: Backbone) -> str:
    """The model of a flow or set, and whether it is still attached to it."""
    family = backbone.model.config.model_type
    return f"{'attached to' if flow.attached else 'detached from'} {family} of {backbone.shape.layers} layers"

"""What a policy will cost on a backbone of a given shape, from its forecast alone: no weights, no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from dropflow import Policy
from dropflow.backbone.flops import DecoderWidths, vision_only
from dropflow.policy.plan import resolve
from dropflow.policy.solve import solved_numbers
from dropflow.units import BackboneShape
from dropflow_lab.explain.beside import Beside, beside
from dropflow_lab.inputs.widths import TowerWidths

UNIT = "multiply-adds of the visual tokens alone, 4 n d^2 + 2 n^2 d + 3 n d m per layer"


@dataclass(frozen=True)
class LayerForecast:
    """One decoder layer under a policy; `None` where the data decides."""

    layer: int
    visual_tokens: int | None
    kv_entries: int | None
    """Visual and text tokens that this layer's KV cache holds after prefill."""
    flops: float | None
    """Multiply-adds, by the vision-only formula."""


@dataclass(frozen=True)
class Explanation:
    """A policy's forecast for one image, layer by layer and in total."""

    policy: str
    layers: tuple[LayerForecast, ...]
    average_visual_tokens: float | None
    """Mean over all layers, text-only ones included."""
    entry_visual_tokens: int | None
    """Visual tokens handed to the LLM."""
    tower_visual_tokens: int | None
    """Visual tokens whose patches enter the vision tower; its work is not part of the FLOPs."""
    flops: float | None
    flops_dense: float
    """The same sum without the policy."""
    ranked_by: dict[int, int]
    """Boundary -> the layer whose attention ranks there, where the boundary's own layer has none."""
    overlap: Beside
    """What `attach(..., overlap=True)` could run side by side."""
    budget: dict[str, float] = field(default_factory=dict)
    """What the policy may cost, if it states that."""
    solved: dict[str, int | float] = field(default_factory=dict)
    """Path in the policy -> the number that was solved from the budget."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with the unit of the layers' FLOPs."""
        return asdict(self) | {"unit": UNIT}


def explain(
    policy: Policy, shape: BackboneShape, widths: DecoderWidths, text_tokens: int, tower: TowerWidths | None = None
) -> Explanation:
    """Follow one image through the layers; raises `PolicyError` where the policy does not fit `shape`.

    FLOPs are those of the papers (`dropflow.flops.vision_only`): they leave out text, cross attention and ranking.
    """
    plan = resolve(policy, shape, work=partial(vision_only, shape=widths))
    schedule = plan.schedule()
    layers = tuple(
        LayerForecast(
            layer,
            count,
            _entries(count, text_tokens, attends=shape.attends(layer)),
            None if count is None else vision_only(count, widths),
        )
        for layer, count in enumerate(schedule.per_layer)
    )
    known = [layer.flops for layer in layers if layer.flops is not None]
    return Explanation(
        policy=policy.name,
        layers=layers,
        average_visual_tokens=schedule.average,
        entry_visual_tokens=schedule.entry,
        tower_visual_tokens=schedule.tower,
        flops=sum(known) if len(known) == len(layers) else None,
        flops_dense=shape.layers * vision_only(shape.visual_tokens or 0, widths),
        ranked_by=plan.ranked_by,
        overlap=beside(plan, widths, text_tokens, tower),
        budget={} if policy.budget is None else policy.budget.model_dump(exclude_none=True),
        solved=solved_numbers(policy, plan.policy),
    )


def _entries(visual: int | None, text: int, *, attends: bool) -> int | None:
    """Entries of a layer's cache after prefill; none without attention."""
    if not attends:
        return 0
    return None if visual is None else visual + text

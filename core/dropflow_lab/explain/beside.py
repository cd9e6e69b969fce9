"""What `overlap` could run side by side under a policy: the encoder, and the text layers before vision enters."""

from __future__ import annotations

from dataclasses import dataclass

from dropflow.backbone.flops import DecoderWidths, layer
from dropflow.policy.plan import Plan
from dropflow_lab.inputs.widths import TowerWidths


@dataclass(frozen=True)
class Beside:
    """The two sides of `overlap`, in multiply-adds, for one image; `None` where unknown."""

    layers: int | None
    """Number of decoder layers before vision enters; 0 if nothing runs beside the encoder, `None` if data decide."""
    text_tokens: int
    text_flops: float | None
    """Work of these layers on the text."""
    vision_flops: float | None
    """Work of the encoder, whatever the policy drops in it; `None` if its sizes are unknown."""

    @property
    def most_saved(self) -> float | None:
        """The smaller side, which is all that overlap can hide."""
        if self.text_flops is None or self.vision_flops is None:
            return None
        return min(self.text_flops, self.vision_flops)


def beside(plan: Plan, widths: DecoderWidths, text_tokens: int, tower: TowerWidths | None) -> Beside:
    """Return what a policy lets run beside the encoder of sizes `tower`, for a prompt of `text_tokens`."""
    entries = [plan.forecasts[name].entry for name, _ in plan.hooks.implementers("inject")]
    layers = None if None in entries else plan.window.entry
    text = None if layers is None else layers * layer(text_tokens, text_tokens, widths)
    return Beside(layers, text_tokens, text, None if tower is None else tower.flops)

"""`dropflow explain`: tokens, KV entries and FLOPs per layer, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands.options import AsJson, Layers, Overrides, PolicyArgument, VisualTokens
from dropflow_lab.console.commands.output import chatter_to_stderr, emit, si

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow.backbone.flops import DecoderWidths
    from dropflow_lab.explain.beside import Beside
    from dropflow_lab.explain.forecast import Explanation

_LAYERS, _VISUAL_TOKENS = 32, 576


def explain(
    policy: PolicyArgument,
    layers: Layers = None,
    visual_tokens: VisualTokens = None,
    text_tokens: Annotated[int, typer.Option(min=0, help="Text tokens of the prompt, for the KV entries.")] = 64,
    config: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model folder whose config.json gives widths and depth.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what a policy does in every layer of a backbone, without loading weights.

    FLOPs count the visual tokens alone, in multiply-adds, as the pruning papers do: 4 n d^2 + 2 n^2 d + 3 n d m per
    layer. Text, cross attention to text and ranking are left out. The line on overlap counts the text in the layers
    before vision enters, and the encoder: what `attach(..., overlap=True)` runs side by side. Depth and visual tokens
    default to those the policy is tuned for, or to 32 and 576; widths are those of LLaVA-1.5-7B unless --config is
    given.
    """
    from dropflow import load_policy
    from dropflow.backbone.flops import LLAVA_7B
    from dropflow.backbone.mixers import shape_of
    from dropflow.units import BackboneShape
    from dropflow_lab.explain.forecast import explain as forecast
    from dropflow_lab.inputs.widths import CLIP_L_336, read_widths

    with chatter_to_stderr():
        loaded = load_policy(policy, overrides or ())
        widths, mixers, tower = (LLAVA_7B, (), CLIP_L_336) if config is None else read_widths(config)
        tuned = loaded.tuned_for
        depth = layers or len(mixers) or (tuned.layers if tuned else _LAYERS)
        tokens = visual_tokens or (tuned.visual_tokens if tuned else _VISUAL_TOKENS)
        shape = shape_of(mixers, tokens) if depth == len(mixers) else BackboneShape(depth, tokens)
        explanation = forecast(loaded, shape, widths, text_tokens, tower)
    emit(explanation.to_json(), as_json, _table(explanation), _summary(explanation, widths))


def _table(explanation: Explanation) -> Table:
    from rich.table import Table

    table = Table(title=explanation.policy)
    for column in ("layer", "visual tokens", "KV entries", "FLOPs"):
        table.add_column(column, justify="right")
    for layer in explanation.layers:
        flops = "data" if layer.flops is None else si(layer.flops)
        table.add_row(str(layer.layer), _count(layer.visual_tokens), _count(layer.kv_entries), flops)
    return table


def _summary(explanation: Explanation, widths: DecoderWidths) -> str:
    from dropflow_lab.explain.forecast import UNIT

    average, flops, dense = explanation.average_visual_tokens, explanation.flops, explanation.flops_dense
    share = "" if flops is None else f" ({1 - flops / dense:.1%} fewer)"
    ranked = (
        f"boundary {boundary}: ranks by layer {layer}, the last one up to there with attention"
        for boundary, layer in explanation.ranked_by.items()
    )
    budget = "".join(f"{name} {value:g}" for name, value in explanation.budget.items())
    solved = (f"{path}: {value:g}, solved for {budget}" for path, value in explanation.solved.items())
    return "\n".join(
        (
            *solved,
            *ranked,
            f"visual tokens: {'data' if average is None else f'{average:.2f}'} on average over "
            f"{len(explanation.layers)} layers, {_count(explanation.entry_visual_tokens)} at entry to the LLM, "
            f"{_count(explanation.tower_visual_tokens)} at entry to the vision tower",
            f"FLOPs: {'data' if flops is None else si(flops)} of {si(dense)}{share}",
            _overlap(explanation.overlap),
            f"FLOPs are {UNIT} (d = {widths.hidden}, m = {widths.intermediate}); text, cross attention and ranking "
            "are left out",
        )
    )


def _overlap(sides: Beside) -> str:
    """What could run beside the encoder, and the limit of what that saves."""
    if sides.layers == 0:
        return "overlap: nothing can run beside the encoder, since vision takes part from the first layer on"
    if sides.layers is None or sides.text_flops is None:
        return "overlap: the data decide before which layer vision enters, and so what can run beside the encoder"
    last, text, vision, most = sides.layers - 1, si(sides.text_flops), sides.vision_flops, sides.most_saved
    encoder = (
        f"the encoder's {si(vision)}, so that at most {si(most)} are hidden"
        if vision is not None and most is not None
        else "the encoder, whose sizes are unknown; at most the smaller side is hidden"
    )
    return f"overlap: layers 0 to {last} on {sides.text_tokens} text tokens, {text}, can run beside {encoder}"


def _count(value: int | None) -> str:
    return "data" if value is None else str(value)

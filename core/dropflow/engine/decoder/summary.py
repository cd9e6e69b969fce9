"""Computes the report from the records of a prompt and its answer; only this module waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dropflow.backbone import flops
from dropflow.engine.decoder.kv_history import Attended, Held, held_with
from dropflow.engine.decoder.record import PromptRecord
from dropflow.engine.decoder.report import LayerReport, Report
from dropflow.engine.tokens.prompt import Prompt


def summed_up(record: PromptRecord) -> Report:
    """The report on a prompt and on what has followed on its cache."""
    depth = record.plan.shape.layers
    visual, (work, dense_work) = _visual_tokens(record), _flops(record)
    held, after, end = _kv(record)
    held_after, held_end = _own_entries(record, after), _own_entries(record, end)
    kv, kv_end = (_every_layer(record, one) for one in (after, end))
    attended = [] if record.history is None else record.history.attended()
    read = _read(record, attended)
    bytes_per_entry = flops.kv_bytes(1, record.widths, max(part.bytes_per_number for part in record.parts))
    brought = [part.prompt for part in record.parts if part.prompt is not None]
    towers = [prompt.tower for prompt in brought if prompt.tower is not None]
    encoded = len(towers) == len(brought)
    return Report(
        policy=record.plan.policy.name,
        layers=tuple(
            LayerReport(
                layer=layer,
                visual_tokens=visual[layer],
                kv_entries=kv.entries[layer] / after.rows,
                flops=work[layer],
                visual_entries_end=kv_end.visual[layer] / end.rows,
                kv_entries_end=kv_end.entries[layer] / end.rows,
                kv_entries_read=read[layer],
            )
            for layer in range(depth)
        ),
        average_visual_tokens=_mean(visual),
        entry_visual_tokens=sum(_mean((prompt.present & prompt.visual).sum(1).tolist()) for prompt in brought),
        tower_visual_tokens=sum(_mean(tower.sum(1).tolist()) for tower in towers) if encoded else None,
        tower_visual_tokens_dense=_patches(brought) if encoded else None,
        flops=sum(work),
        flops_dense=dense_work,
        kv_bytes=held_after * bytes_per_entry,
        kv_bytes_dense=after.dense * len(record.holding) / after.rows * bytes_per_entry,
        steps=max(record.seen_now() - record.length, 0),
        kv_bytes_end=held_end * bytes_per_entry,
        kv_bytes_end_dense=end.dense * len(record.holding) / end.rows * bytes_per_entry,
        kv_entries_over_time=tuple(_own_entries(record, one) for one in held),
        kv_entries_read_over_time=tuple(sum(one.entries) for one in attended),
        kv_bytes_read=sum(read) * bytes_per_entry,
        average_visual_tokens_answer=_attended(record, visual, attended),
        overlap=next((part.overlap for part in reversed(record.parts) if part.overlap is not None), None),
    )


def _visual_tokens(record: PromptRecord) -> list[float]:
    """Live visual tokens of the prompt in each layer."""
    depth = record.plan.shape.layers
    counts = torch.stack([(part.live(depth) & part.visual).sum(2) for part in record.parts]).sum(0)
    return [_mean(row) for row in counts.tolist()]


def _patches(brought: Sequence[Prompt]) -> float:
    """Visual tokens that stand for patches, dropped ones included."""
    return sum(_mean((prompt.scored >= 0).sum(1).tolist()) for prompt in brought)


def _flops(record: PromptRecord) -> tuple[list[float], float]:
    """Multiply-adds of each layer in the prompt, and of all layers together with every visual token."""
    own, dense = [], []
    depth, work = record.plan.shape.layers, record.work_without_attention
    for part in record.parts:
        text, visual = part.text.sum(1), part.visual.sum(1)
        present = part.live(depth) & (part.visual | part.text)
        live, keys = (part.ran(depth) & present).sum(2), present.sum(2)
        whole = seen = text + visual
        if part.past is not None:
            keys = live.index_add(0, _numbers(record, live), part.past.entries.to(live.device))
            seen = whole + part.past.dense.to(live.device)
        layers, whole_layers = flops.layer(live, keys, record.widths), flops.layer(whole, seen, record.widths)
        whole_layers = whole_layers.repeat(depth, 1)
        for number, _ in record.plan.shape.producers:  # no projections of k and v
            saved = 2 * record.widths.hidden * record.widths.kv_heads * record.widths.head_dim
            layers[number], whole_layers[number] = (
                layers[number] - live[number] * saved,
                whole_layers[number] - whole * saved,
            )
        for number, per_token in work.items():
            layers[number], whole_layers[number] = live[number] * per_token, whole * per_token
        own.append(layers)
        dense.append(whole_layers)
    return [_mean(row) for row in torch.stack(own).sum(0).tolist()], _mean(torch.stack(dense).sum((0, 1)).tolist())


def _numbers(record: PromptRecord, like: Tensor) -> Tensor:
    """Numbers of the layers with attention."""
    return torch.tensor(tuple(record.attending), device=like.device)


def _every_layer(record: PromptRecord, held: Held) -> Held:
    """What was held, for every decoder layer: nothing in those without keys of their own."""
    entries, visual = (
        dict(zip(record.attending, held.entries, strict=True)),
        dict(zip(record.attending, held.visual, strict=True)),
    )
    depth, holding = record.plan.shape.layers, set(record.holding)
    return replace(
        held,
        entries=tuple(entries[layer] if layer in holding else 0 for layer in range(depth)),
        visual=tuple(visual[layer] if layer in holding else 0 for layer in range(depth)),
    )


def _own_entries(record: PromptRecord, held: Held) -> float:
    """Entries of all layers' caches, as the mean over samples; layers that share keys hold none."""
    return sum(_every_layer(record, held).entries) / held.rows


def _kv(record: PromptRecord) -> tuple[list[Held], Held, Held]:
    """What the caches held after every forward and after the prompt without drafts, and what they hold now."""
    history, cache = record.history, record.cache
    if history is None:
        none = (0,) * len(record.attending)
        nothing = Held(1, none, none, 0)
        return [nothing], nothing, nothing
    held = history.moments()
    now = held[-1] if cache is None else held_with(record.held(), record.seen_now())
    return held, held[0].after(-record.parts[-1].taken_back), now


def _read(record: PromptRecord, attended: Sequence[Attended]) -> list[float]:
    """Tokens that each layer attended to after the prompt, as the mean over forwards; 0 where there was none."""
    found = [0.0] * record.plan.shape.layers
    for number, layer in enumerate(record.attending):
        if attended:
            found[layer] = _mean([one.entries[number] for one in attended])
    return found


def _attended(record: PromptRecord, visual: Sequence[float], attended: Sequence[Attended]) -> float:
    """Mean number of visual tokens a layer attends to, over layers and forwards.

    Layers without attention count in the prompt, which they read, and as 0 later.
    """
    depth = record.plan.shape.layers
    past = record.parts[0].past
    earlier = 0.0 if past is None else sum(_mean(row) for row in past.visual.tolist()) / depth
    return _mean([earlier + _mean(visual), *(sum(one.visual) / depth for one in attended)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""Computes the report from the records of a prompt and its answer; only this module waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dropflow.backbone import flops
from dropflow.engine.decoder.kv_history import Held, held_with
from dropflow.engine.decoder.record import PromptRecord
from dropflow.engine.decoder.report import LayerReport, Report


def summed_up(record: PromptRecord) -> Report:
    """The report on a prompt and on what has followed on its cache."""
    depth = record.plan.shape.layers
    visual, (work, dense_work) = _visual_tokens(record), _flops(record)
    held, after, end = _kv(record)
    bytes_per_entry = flops.kv_bytes(1, record.widths, max(part.bytes_per_number for part in record.parts))
    brought = [part.prompt for part in record.parts if part.prompt is not None]
    return Report(
        policy=record.plan.policy.name,
        layers=tuple(
            LayerReport(
                layer=layer,
                visual_tokens=visual[layer],
                kv_entries=after.entries[layer] / after.rows,
                flops=work[layer],
                visual_entries_end=end.visual[layer] / end.rows,
                kv_entries_end=end.entries[layer] / end.rows,
            )
            for layer in range(depth)
        ),
        average_visual_tokens=_mean(visual),
        entry_visual_tokens=sum(_mean((prompt.present & prompt.visual).sum(1).tolist()) for prompt in brought),
        flops=sum(work),
        flops_dense=dense_work * depth,
        kv_bytes=sum(after.entries) / after.rows * bytes_per_entry,
        kv_bytes_dense=after.dense * depth / after.rows * bytes_per_entry,
        steps=max(record.seen_now() - record.length, 0),
        kv_bytes_end=sum(end.entries) / end.rows * bytes_per_entry,
        kv_bytes_end_dense=end.dense * depth / end.rows * bytes_per_entry,
        kv_entries_over_time=tuple(sum(one.entries) / one.rows for one in held),
        average_visual_tokens_answer=_attended(record, visual, held),
    )


def _visual_tokens(record: PromptRecord) -> list[float]:
    """Live visual tokens of the prompt in each layer."""
    depth = record.plan.shape.layers
    counts = torch.stack([(part.live(depth) & part.visual).sum(2) for part in record.parts]).sum(0)
    return [_mean(row) for row in counts.tolist()]


def _flops(record: PromptRecord) -> tuple[list[float], float]:
    """Multiply-adds of each layer in the prompt, and of one layer with every visual token."""
    own, dense = [], []
    for part in record.parts:
        text, visual = part.text.sum(1), part.visual.sum(1)
        live = (part.live(record.plan.shape.layers) & part.visual).sum(2) + text
        whole = seen = text + visual
        keys = live
        if part.past is not None:
            keys, seen = live + part.past.entries.to(live.device), whole + part.past.dense.to(live.device)
        own.append(flops.layer(live, keys, record.widths))
        dense.append(flops.layer(whole, seen, record.widths))
    return [_mean(row) for row in torch.stack(own).sum(0).tolist()], _mean(torch.stack(dense).sum(0).tolist())


def _kv(record: PromptRecord) -> tuple[list[Held], Held, Held]:
    """What the caches held after every forward and after the prompt without drafts, and what they hold now."""
    history, cache = record.history, record.cache
    if history is None:
        none = (0,) * record.plan.shape.layers
        nothing = Held(1, none, none, 0)
        return [nothing], nothing, nothing
    held = history.moments()
    now = held[-1] if cache is None else held_with(record.held(), record.seen_now())
    return held, held[0].after(-record.parts[-1].taken_back), now


def _attended(record: PromptRecord, visual: Sequence[float], held: Sequence[Held]) -> float:
    """Mean number of visual tokens a layer attends to, over layers and forwards, from what was held before each."""
    past = record.parts[0].past
    earlier = 0.0 if past is None else _mean([_mean(row) for row in past.visual.tolist()])
    return _mean([earlier + _mean(visual), *(_mean(one.visual) / one.rows for one in held[:-1])])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

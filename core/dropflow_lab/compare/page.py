"""A comparison in Markdown: which policies are above random pruning on each model, and all numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dropflow_lab.compare import cells
from dropflow_lab.compare.cost import Work
from dropflow_lab.compare.rows import Row, Title
from dropflow_lab.markdown import table

_VERDICTS = ("above", "level", "below")


def page(rows: Sequence[Row], refused: Mapping[str, str], asked: str, apart: Sequence[str]) -> str:
    """Return the whole comparison; `asked` describes the questions, `apart` names the kinds with separate columns."""
    models = list(dict.fromkeys(row.title.model for row in rows))
    by_model = {model: [row for row in rows if row.title.model == model] for model in models}
    blocks = [asked]
    if any(row.control is not None for row in rows):
        counts = "\n".join(_count(model, own) for model, own in by_model.items())
        blocks += ["### Above random, level with it, below", counts, _verdicts(rows, models)]
    for model, own in by_model.items():
        blocks += [f"### On `{model}`" if model else "### All numbers", _numbers(own, apart)]
    if refused:
        blocks += ["### Not measured", "\n".join(dict.fromkeys(map(_refusal, refused, refused.values())))]
    return "\n\n".join(blocks)


def _count(model: str, rows: Sequence[Row]) -> str:
    """How many rows of a model are above random, level with it, and below."""
    found = Counter(row.control.gain.verdict for row in rows if row.control is not None)
    where = f"On `{model}`" if model else "Of all rows"
    return f"- {where}: " + ", ".join(f"{found[verdict]} {verdict}" for verdict in _VERDICTS) + "."


def _refusal(name: str, reason: str) -> str:
    """One line, the same for every model that refuses a policy for the same reason."""
    return f"- `{name.partition('@')[0]}`: {'; '.join(reason.splitlines())}"


def _verdicts(rows: Sequence[Row], models: Sequence[str]) -> str:
    """One line per policy, one column per model."""
    lines: dict[Title, dict[str, Row]] = {}
    for row in rows:
        if row.control is not None or row.no_control:
            lines.setdefault(replace(row.title, model=""), {})[row.title.model] = row
    heads = [f"`{model}`" if model else "gain over random" for model in models]
    body = []
    for title, found in lines.items():
        averages = dict.fromkeys(cells.average(row) for row in found.values())
        own = [_verdict(found.get(model)) for model in models]
        body.append([_name(title), " / ".join(averages), *own])
    return table(("policy", "average tokens", *heads), body)


def _verdict(row: Row | None) -> str:
    if row is None or row.control is None:
        return cells.NONE if row is None else cells.gain(row)
    verdict = row.control.gain.verdict
    numbers = cells.signed(row.control.gain).removesuffix(f" {verdict}")
    return f"{verdict if verdict != 'above' else '**above**'} {numbers}"


def _numbers(rows: Sequence[Row], apart: Sequence[str]) -> str:
    head = ("policy", "average tokens", "at entry", "accuracy", *(f"`{kind}`" for kind in apart), "random", "gain")
    costs = ("FLOPs", "KV", "KV at the end", "first token", "total time")
    timed = any(row.cost is not None for row in rows)
    return table((*head, *costs * timed), [[*_line(row, apart), *_costs(row) * timed] for row in rows])


def _line(row: Row, apart: Sequence[str]) -> list[str]:
    return [
        _name(replace(row.title, model="")),
        cells.average(row),
        f"{row.entry_visual_tokens:.1f}",
        cells.share(row.accuracy or row.agreement),
        *cells.apart(row, apart),
        cells.control(row),
        cells.gain(row),
    ]


def _costs(row: Row) -> list[str]:
    """FLOPs and KV bytes as shares of those without a policy, and times as ratios to those without it."""
    if row.cost is None:
        return [cells.NONE] * 5
    work, dense, times = row.cost.work, row.cost.dense, row.cost.times
    shares = [f"{_over(work, dense, name):.1%}" for name in ("flops_formula", "kv_bytes", "kv_bytes_end")]
    return [*shares, *([cells.NONE] * 2 if times is None else [cells.ratio(times.prefill), cells.ratio(times.total)])]


def _over(work: Work, dense: Work, name: str) -> float:
    return float(getattr(work, name) / getattr(dense, name))


def _name(title: Title) -> str:
    names = ", ".join(f"`{name}`" for name in (title.policy, *title.also))
    return names + str(replace(title, policy="", also=()))

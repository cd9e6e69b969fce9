"""Lists every type of multimodal model in transformers: its adapter and facts, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers
from transformers.utils import logging

import dropflow
from dropflow import Encode, EncodeCall, Keep, PruneCall, Stage, WindowCall, backbone_for, hookimpl
from dropflow.errors import DropflowError
from dropflow.policy import registry
from dropflow_lab.backbones.miniature import class_name, kinds, miniature
from dropflow_lab.markdown import table

Row = dict[str, Any]


class _Encodes(Stage[Any]):
    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Keep every row."""
        return Encode(keep=tuple(places >= 0 for places in call.places))


class _Prunes(Stage[Any]):
    @property
    def prune_at(self) -> tuple[int, ...]:
        """Every boundary."""
        return tuple(range(self.context.scale.target.layers))

    @hookimpl
    def prune(self, call: PruneCall) -> Keep | None:  # noqa: ARG002
        """Leave everything."""
        return None


class _Enters(Stage[Any]):
    @hookimpl
    def inject(self, call: WindowCall) -> int:
        """The middle of the decoder."""
        return call.backbone.shape.layers // 2


PROBES: Mapping[str, type[Stage[Any]]] = {"encode": _Encodes, "prune": _Prunes, "inject": _Enters}
"""Hook -> a stage that asks for it wherever it can."""


def models(build: Callable[[str], Any] = miniature) -> list[Row]:
    """Every type with its model class, and with its adapter, facts and limits or the reason why it is not served.

    A type is built in miniature, by `build`, and `attach` is asked. `status` is "served", "refused" or "not built".
    What transformers warns of the miniatures' configs is not shown.
    """
    said = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        return [_summed_up({"name": kind, "class": class_name(kind)} | _asked(kind, build)) for kind in kinds()]
    finally:
        logging.set_verbosity(said)


def _asked(kind: str, build: Callable[[str], Any]) -> Row:
    try:
        model = build(kind)
    except Exception as error:  # noqa: BLE001  # transformers raises all kinds of errors for a missing library
        return _row("not built", reason=_first_line(str(error)).partition(". ")[0])
    try:
        backbone = backbone_for(model)
    except DropflowError as error:
        return _row("refused", reason=_reason(error))
    refusals = {hook: _refusal(model, stage) for hook, stage in PROBES.items()}
    limits = {hook: reason for hook, reason in refusals.items() if reason}
    if len(limits) == len(PROBES):
        return _row("refused", reason=next(iter(limits.values())))
    adapter = kind if kind in registry.names(registry.ADAPTERS) else "auto"
    return _row("served", adapter, sorted(backbone.facts()), limits)


def _summed_up(row: Row) -> Row:
    how = f" by {row['adapter']}: {', '.join(row['facts'])}" if row["status"] == "served" else f": {row['reason']}"
    return row | {"summary": row["status"] + how}


def _row(
    status: str, adapter: str = "", facts: list[str] | None = None, limits: Row | None = None, reason: str = ""
) -> Row:
    return {"status": status, "adapter": adapter, "facts": facts or [], "limits": limits or {}, "reason": reason}


def _refusal(model: Any, stage: type[Stage[Any]]) -> str:
    """Why `attach` refuses a stage on a model; "" if it does not."""
    try:
        model.train()  # for stages that have no weights yet
        dropflow.attach(model, {"name": "asked", "stages": {"asked": {"use": stage}}}).detach()
    except DropflowError as error:
        return _reason(error)
    finally:
        model.eval()
    return ""


def _reason(error: DropflowError) -> str:
    """The reason in a refusal, without the model's name and the advice, which are those of every refusal."""
    text = str(error).partition("cannot serve it: ")[2].partition(". Pass `adapter=`")[0] or str(error)
    return _first_line(text.removeprefix("stages.asked: "))


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def models_in_markdown(rows: Sequence[Row] | None = None) -> str:
    """Every type (by default `models()`) as Markdown tables: those that are served, and the others."""
    rows = models() if rows is None else rows
    served = [row for row in rows if row["status"] == "served"]
    others = [row for row in rows if row["status"] != "served"]
    head = f"{len(rows)} types in transformers {transformers.__version__}: {len(served)} are served."
    first = table(("type", "class", "adapter", "facts", "limits"), map(_served, served))
    return "\n\n".join((head, first, table(("type", "class", "", "why"), map(_unserved, others))))


def _served(row: Row) -> tuple[str, ...]:
    facts = ", ".join(f"`{fact}`" for fact in row["facts"])
    limits = "; ".join(f"`{hook}`: {reason}" for hook, reason in row["limits"].items())
    return f"`{row['name']}`", f"`{row['class']}`", f"`{row['adapter']}`", facts, limits


def _unserved(row: Row) -> tuple[str, ...]:
    return f"`{row['name']}`", f"`{row['class']}`", row["status"], row["reason"]

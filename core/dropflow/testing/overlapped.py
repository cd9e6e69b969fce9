"""Checks that encoding beside the text layers changes nothing, on families whose adapter says that it is possible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dropflow.errors import DropflowError
from dropflow.testing.case import BUDGET, NO_OP, Case
from dropflow.testing.guarantees import CHECKS

BESIDE = "images encoded beside the text layers"


@torch.no_grad()
def check_same_bits(case: Case) -> None:
    """Check that logits, loss, live tokens and generated tokens are those of the run that encodes first.

    Nothing is checked for a family whose adapter states no `features_form`.
    """
    left, runs = case.padded_left().inputs, []
    for overlap in (False, True):
        own = replace(case, overlap=overlap)
        model = own.model
        with own.attach() as flow, _naming_the_form(own):
            logits = model(**case.inputs).logits
            live, told = flow.live(), flow.report().overlap
            loss = model(**case.inputs, labels=case.inputs["input_ids"]).loss
            runs.append((logits, live, loss, model.generate(**left, **BUDGET)))
    if not str(told).startswith(BESIDE):
        raise case.broken(NO_OP, f"with `overlap`, {told}, though nothing prevents encoding beside them")
    names = ("logits", "live tokens", "the loss", "generated tokens")
    for what, serial, beside in zip(names, *runs, strict=True):
        if not torch.equal(serial, beside):
            raise case.broken(
                NO_OP,
                f"with `overlap`, {what} differ from those of the serial run; see `features_form` and "
                f"`deepstack_levels` of {case.adapter.__name__}",
            )


@contextmanager
def _naming_the_form(case: Case) -> Iterator[None]:
    """Says what an error of a core is about that got features in a form it does not take."""
    try:
        yield
    except (AttributeError, TypeError, IndexError, RuntimeError) as error:
        if not case.overlap or isinstance(error, DropflowError):
            raise
        raise case.broken(
            NO_OP, f"with `overlap`, the core fails: {error}; see `features_form` of {case.adapter.__name__}"
        ) from error


def check_overlap(case: Case, *, thorough: bool = True) -> float:
    """Check that `overlap` gives the same bits and, if `thorough`, all guarantees; return the largest error."""
    if case.adapter.features_form is None:
        return 0.0
    check_same_bits(case)
    if not thorough:
        return 0.0
    own: Any = replace(case, name=f"{case.name}, with overlap", overlap=True)
    return max(check(own) for check in CHECKS.values())

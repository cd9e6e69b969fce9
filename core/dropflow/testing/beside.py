"""Checks a stage together with other stages, and on models that lack facts it does not list in `needs`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from dropflow.engine.attach.flow import Flow
from dropflow.errors import DecisionError, PolicyError, UnsupportedModel
from dropflow.lifecycle.payloads import EncodeCall, PruneCall
from dropflow.testing.case import REFUSAL, BrokenGuarantee, Case
from dropflow.testing.guarantees import check_batch_invariance, check_prefill
from dropflow.testing.probes import EveryThird, Ranked, use

SEEN = ("cls", "grid", "final_norm", "rotary")
"""Facts that stages read from their payloads; the engine itself refuses policies that need other missing facts."""


def check_beside(case: Case) -> float:
    """Check guarantees 2 and 3 for the case's stages between an `encode` stage and a `prune` stage.

    Nothing is checked if the policy is refused, as for a stage that needs whole images. Returns the largest relative
    error.
    """
    stages = {"kit-encode": use(EveryThird), **case.policy["stages"], "kit-prune": use(Ranked)}
    name = f"{case.name} (beside an encode and a prune stage)"
    mixed = replace(case, name=name, policy={**case.policy, "stages": stages})
    try:
        with torch.no_grad(), mixed.attach():
            mixed.model(**mixed.inputs)
        return max(check_prefill(mixed), check_batch_invariance(mixed))
    except (PolicyError, UnsupportedModel, DecisionError):
        return 0.0
    except BrokenGuarantee:
        raise
    except Exception as error:
        raise mixed.broken(
            REFUSAL, f"neither runs nor is refused: {error!r}; check what the stage assumes about its payload"
        ) from error


@torch.no_grad()
def check_needs(case: Case) -> None:
    """Check that a stage runs without the facts it does not list in `needs`, or is refused when it is attached.

    Raises `BrokenGuarantee` naming the fact.
    """
    with case.attach() as flow:
        declared = frozenset().union(*(stage.needs for _, stage in flow.plan.stages))
        lacking = [fact for fact in SEEN if fact not in declared]
        if _fails(case, flow, lacking) is None:
            return
        for fact in lacking:
            error = _fails(case, flow, [fact])
            if error is not None:
                raise case.broken(
                    REFUSAL,
                    f"on a model without the fact '{fact}', which the stage does not list in `needs`, it fails only "
                    f"while the model runs: {error!r}; list the fact, or make the stage work without it",
                ) from error


def _fails(case: Case, flow: Flow, lacking: Sequence[str]) -> Exception | None:
    try:
        with _without(flow, lacking):
            case.model(**case.inputs)
    except Exception as error:  # noqa: BLE001  # whatever the stage raises is reported
        return error
    return None


@contextmanager
def _without(flow: Flow, facts: Sequence[str]) -> Iterator[None]:
    """Show the flow's stages payloads without these facts."""
    hooks = flow.plan.hooks
    encode, prune = hooks.encode, hooks.prune

    def without_cls_and_grid(call: EncodeCall, stage: Any) -> Any:
        less: dict[str, Any] = {"has_cls": False} if "cls" in facts else {}
        if "grid" in facts:
            less["grids"] = (None,) * len(call.grids)
        return encode(replace(call, **less), stage)

    def without_norm_and_rotary(call: PruneCall, stage: Any) -> Any:
        less: dict[str, Any] = {"final_norm": None} if "final_norm" in facts else {}
        if "rotary" in facts:
            less["tapped"] = lambda layer: replace(call.tapped(layer), rotary=None)
        return prune(replace(call, **less), stage)

    with (
        mock.patch.object(hooks, "encode", without_cls_and_grid),
        mock.patch.object(hooks, "prune", without_norm_and_rotary),
    ):
        yield

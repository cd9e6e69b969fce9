"""Compares a packed vision tower that runs on some units with its full run, in which the other units are masked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dropflow.errors import UnsupportedModel
from dropflow.lifecycle.events import EncodeStep
from dropflow.testing.case import MASK, Case, relative_error
from dropflow.testing.masked_tower import masked_features
from dropflow.testing.probes import LeaveOut


@torch.no_grad()
def check_units(case: Case) -> float:
    """Check the units that a packed tower runs on under the case's policy against the full tower, for all pictures.

    The policy has a stage `units`, a `LeaveOut`. Returns the largest relative error, and raises `BrokenGuarantee` for
    one that is too large, naming the part of the adapter to correct.
    """
    core, worst = case.adapter(case.model).core, 0.0
    for modality in case.adapter.modalities:
        method = f"get_{modality}_features"
        names = inspect.signature(getattr(core, method)).parameters
        given = {name: value for name, value in case.inputs.items() if name in names}
        pixels = next((name for name in given if name.startswith("pixel_values")), None)
        if pixels is None:
            continue
        try:
            with case.attach() as flow:
                got = getattr(core, method)(**given)
                stage = cast(LeaveOut, dict(flow.plan.stages)["units"])
        except (RuntimeError, IndexError, UnsupportedModel) as fault:
            raise case.broken(
                MASK,
                f"the vision tower cannot run on some {modality} units: {fault}; correct `packed_tower` of the "
                f"adapter {case.adapter.__name__}",
            ) from fault
        expected = masked(case, method, given, pixels, stage.steps)
        kept = got.flags().kept
        pairs = zip(rows_of(got, kept), rows_of(expected, kept), strict=True)
        for number, (value, true) in enumerate(pairs):
            error = relative_error(value, true)
            if not error < case.tiny.tolerance:
                what = "the features" if not number else f"deepstack features {number - 1}"
                raise case.broken(
                    MASK,
                    f"{what} of the {modality} units that stay differ from those of the full vision tower with the "
                    f"others masked by {error:.1e}, allowed {case.tiny.tolerance:.0e}; correct `packed_tower` of "
                    f"the adapter {case.adapter.__name__}",
                )
            worst = max(worst, error)
    return worst


def masked(case: Case, method: str, given: Mapping[str, Any], pixels: str, steps: Sequence[EncodeStep]) -> Any:
    """Features of the plain model's `method` in which the units that these steps left out are masked as keys."""
    backbone = case.adapter(case.model)
    tower, core = backbone.packed_tower, backbone.core
    assert tower is not None
    return masked_features(
        lambda values: getattr(core, method)(**{**given, pixels: values}),
        given[pixels],
        gone_rows(steps, tower.unit),
        tower.owner.config._attn_implementation,
    )


def gone_rows(steps: Sequence[EncodeStep], unit: int) -> dict[int, Tensor]:
    """For the blocks before which steps left units out, the rows that are gone from there on, of `unit` rows each.

    The first step has seen all units.
    """
    sizes = [len(before) for before in steps[0].before]
    found: dict[int, Tensor] = {}
    for step in steps:
        gone = [
            torch.zeros(size, dtype=torch.bool).index_fill(0, before.cpu(), True).index_fill(0, after.cpu(), False)
            for size, before, after in zip(sizes, step.before, step.places, strict=True)
        ]
        block = 0 if step.boundary == "pixels" else int(cast(int, step.boundary))
        rows = torch.cat(gone).repeat_interleave(unit)
        found[block] = rows | found.get(block, torch.zeros_like(rows))
    return found


def rows_of(features: Any, kept: Tensor) -> list[Tensor]:
    """The rows of features that stay, followed by those of every deepstack layer."""
    layers = [layer for layer in features.get("deepstack_features") or () if layer[0].is_floating_point()]
    return [torch.cat(list(rows))[kept] for rows in (features.pooler_output, *layers)]

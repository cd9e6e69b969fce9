"""Profiles a model's layers: measures, sweeps, and the rule's choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from dropflow.backbone.backbone import backbone_for
from dropflow_lab.inputs.data import Sample
from dropflow_lab.profile.layers import LayerCurves, LayerMeter
from dropflow_lab.profile.pieces import Piece, Pieces
from dropflow_lab.profile.rule import Choice, Knobs, choose
from dropflow_lab.profile.settings import Settings, distances
from dropflow_lab.profile.sweep import Quality, Tally
from dropflow_lab.store.claims import in_order
from dropflow_lab.store.finished import Finished

SCHEMA = "dropflow-profile/1"
"""Version of `profile.json`."""


@dataclass(frozen=True)
class Profile:
    """Everything measured, and the choice based on it."""

    layers: int
    visual_tokens: int
    """Visual tokens of one image; the mean, rounded, where images differ."""
    images_differ: bool
    samples: int
    settings: Settings
    knobs: Knobs
    curves: LayerCurves
    dense: Quality
    exits: tuple[Quality, ...]
    """Quality without vision from boundary x on, for x = 0..L-1."""
    entries: tuple[Quality, ...]
    """Quality with the projector's output entering at boundary e, for e = 0..L-1."""
    choice: Choice

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as written to `profile.json`."""
        return {"schema": SCHEMA, **asdict(self)}


def profile(
    model: Any, processor: Any, samples: Sequence[Sample], settings: Settings, knobs: Knobs, finished: Finished
) -> Profile:
    """Measure every layer of `model` on `samples`, sweep exit and entry, and choose boundaries by the rule.

    All runs go through the engine: the model's own attention, and no full attention map. Finished pieces are read, and
    processes that profile the same into the same folder share them. A progress bar is shown on stderr. Raises
    `InputError` if a knob is out of range (before anything runs), if the samples have no visual tokens, or if the
    budget cannot be met.
    """
    shape = backbone_for(model).shape
    knobs.check(shape.layers)
    pieces = list(Pieces(model, processor, samples, settings, finished).all())
    meter = LayerMeter(model, processor, settings.top, distances(shape.layers))
    sweeps: tuple[list[Tally], list[Tally]] = ([], [])
    for number, piece in enumerate(_tracked(in_order(pieces), len(pieces))):
        if "layers" in piece:
            meter.add(piece["layers"])
        else:
            _add(sweeps[number % 3 - 1], piece["tallies"])
    curves = meter.curves()
    dense, *exits = (tally.quality() for tally in sweeps[0])
    entries = (dense, *(tally.quality() for tally in sweeps[1]))
    tokens = shape.visual_tokens or round(curves.visual_tokens)
    visual = [value or 0.0 for value in curves.intra["visual"]]
    chosen = choose(visual, mean_ilvas(curves), dense.score, [x.score for x in exits], tokens, knobs)
    differ = shape.visual_tokens is None
    return Profile(
        shape.layers, tokens, differ, len(samples), settings, knobs, curves, dense, tuple(exits), entries, chosen
    )


def _tracked(pieces: Iterable[Piece], count: int) -> Iterable[Piece]:
    """Show a progress bar on stderr, if it is a terminal."""
    console = Console(stderr=True)
    return track(pieces, "profile", count, console=console, transient=True, disable=not console.is_terminal)


def mean_ilvas(curves: LayerCurves) -> list[float]:
    """Return ILVAS at boundaries 0.., averaged over the distances, as far as all of them are defined."""
    return [sum(value or 0.0 for value in at) / len(at) for at in zip(*curves.ilvas.values(), strict=False)]


def _add(tallies: list[Tally], found: Sequence[Mapping[str, Any]]) -> None:
    """Add one batch to the tallies of a sweep."""
    tallies += [Tally() for _ in found[len(tallies) :]]
    for tally, more in zip(tallies, found, strict=True):
        tally.right += more["right"]
        tally.same += more["same"]
        tally.kl += more["kl"]

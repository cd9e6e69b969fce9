"""Runs a model over samples and averages the layer-selection measures at every boundary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dropflow import PruneCall
from dropflow.backbone.backbone import backbone_for
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.data import Sample
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.profile.measures import cross_modal_similarity, ilvas, intra_modal_similarity
from dropflow_lab.profile.observe import Groups, visual_attention, watching

MODALITIES = ("system", "visual", "instruction")
Curve = tuple[float | None, ...]
"""One value per layer or boundary; `None` where no sample has one."""


@dataclass(frozen=True)
class LayerCurves:
    """Means over samples of each measure."""

    visual_tokens: float
    """Visual tokens of one image (picture, tile or frame), without a policy."""
    intra: dict[str, Curve]
    """Modality -> cosine between boundary i and i + 1, for i = 0..L-2."""
    cross: Curve
    """Cosine between the instruction states after two unrelated pictures, at boundaries 0..L-1."""
    ilvas: dict[int, Curve]
    """Distance n -> ILVAS(l, l+n), for l = 0..L-1-n."""


@dataclass
class LayerMeter:
    """Collects per-sample values, batch after batch."""

    model: Any
    processor: Any
    top: float
    """Share of a sample's visual tokens that ILVAS compares."""
    distances: Sequence[int]
    _values: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    def measure(self, batch: Sequence[Sample]) -> None:
        """Measure intra-modal similarity and ILVAS on the samples as given."""
        watch = _Pairs()
        self._prefill([(sample.images(), sample.question) for sample in batch], watch.see)
        for (name, layer), value in watch.intra.items():
            self._add(name, layer, value)
        if watch.visual is None:
            raise InputError(
                f"expected visual tokens in the prompt of {batch[0].question!r}, got none; give samples with pictures"
            )
        self._add("tokens", 0, torch.tensor(watch.image_sizes, dtype=torch.float))
        for distance in self.distances:
            for layer in range(len(watch.attention) - distance):
                pair = watch.attention[layer], watch.attention[layer + distance]
                self._add(f"ilvas {distance}", layer, ilvas(*pair, watch.visual, self.top))

    def measure_across(self, batch: Sequence[Sample], others: Sequence[Sample | None], reference: Sample) -> None:
        """Measure cross-modal similarity: questions after the pictures of `others`, and after those of `reference`.

        A question that belongs to the reference's pictures, or has no other sample, is left out.
        """
        own = _names(reference)
        asked = [(s, other) for s, other in zip(batch, others, strict=True) if other is not None and _names(s) != own]
        if not asked:
            return
        states: list[list[Tensor]] = []
        same = reference.images()
        self._prefill([(same, sample.question) for sample, _ in asked], lambda call: states.append(_instructions(call)))

        def compare(call: PruneCall) -> None:
            pairs = zip(_instructions(call), states[call.boundary], strict=True)
            self._add("cross", call.boundary, torch.stack([_compared(one, two) for one, two in pairs]))

        self._prefill([(other.images(), sample.question) for sample, other in asked], compare)

    def values(self) -> dict[str, list[float]]:
        """Return the values of all samples so far, by measure and layer, as plain data."""
        return {f"{name}/{layer}": torch.cat(values).tolist() for (name, layer), values in self._values.items()}

    def add(self, values: Mapping[str, Sequence[float]]) -> None:
        """Add the `values` of another meter."""
        for key, found in values.items():
            name, _, layer = key.rpartition("/")
            self._add(name, int(layer), torch.tensor(found))

    def curves(self) -> LayerCurves:
        """Return the means over all samples so far."""
        return LayerCurves(
            visual_tokens=sum(filter(None, self._curve("tokens"))),
            intra={name: self._curve(name) for name in MODALITIES},
            cross=self._curve("cross"),
            ilvas={distance: self._curve(f"ilvas {distance}") for distance in self.distances},
        )

    def _prefill(self, questions: Sequence[Any], see: Callable[[PruneCall], None]) -> None:
        inputs = build_inputs(self.processor, questions).to(self.model.device, self.model.dtype)
        with watching(self.model, see):
            backbone_for(self.model).core(**inputs, use_cache=False)

    def _add(self, name: str, layer: int, per_sample: Tensor) -> None:
        self._values.setdefault((name, layer), []).append(per_sample.cpu())

    def _curve(self, name: str) -> Curve:
        layers = sorted(layer for known, layer in self._values if known == name)
        means = (float(torch.cat(self._values[name, layer]).nanmean()) for layer in layers)
        return tuple(None if mean != mean else mean for mean in means)


@dataclass
class _Pairs:
    """Compares each boundary with the one before, and keeps the last prompt token's attention in every layer."""

    intra: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    attention: list[Tensor] = field(default_factory=list)
    visual: Tensor | None = None
    image_sizes: tuple[int, ...] = ()
    _before: Tensor | None = None

    def see(self, call: PruneCall) -> None:
        groups = Groups.of(call)
        if self._before is not None:
            for name in MODALITIES:
                value = intra_modal_similarity(self._before, call.hidden, getattr(groups, name))
                self.intra[name, call.boundary - 1] = value
        self._before, self.visual, self.image_sizes = call.hidden, groups.visual, call.image_sizes
        self.attention.append(visual_attention(call))


def _instructions(call: PruneCall) -> list[Tensor]:
    groups = Groups.of(call)
    return [hidden[own] for hidden, own in zip(call.hidden, groups.instruction, strict=True)]


def _compared(one: Tensor, two: Tensor) -> Tensor:
    """Compare the shared end of two prompts; a different number of pictures may change what comes before it."""
    shared = min(len(one), len(two))
    return cross_modal_similarity(one[len(one) - shared :], two[len(two) - shared :])


def other_pictures(samples: Sequence[Sample]) -> list[int | None]:
    """Return for each sample the next one whose pictures are neither its own nor the first sample's, or `None`."""
    names = [_names(sample) for sample in samples]
    return [
        next(
            (j % len(names) for j in range(i + 1, i + len(names)) if names[j % len(names)] not in (own, names[0])), None
        )
        for i, own in enumerate(names)
    ]


def _names(sample: Sample) -> tuple[str, ...]:
    return tuple(picture.name for picture in sample.pictures)

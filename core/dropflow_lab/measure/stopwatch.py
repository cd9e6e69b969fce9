"""Splits the time of `generate` into vision, selection, the rest of the prefill, and decode steps."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dropflow.backbone.backbone import MODALITIES, Backbone
from dropflow_lab.measure.selection_cost import SelectionMeter


@dataclass(frozen=True)
class Split:
    """Seconds of one `generate`, from its call to its last token; the time between decode steps is left out."""

    vision: float
    """Vision tower and projector, without the selection inside them."""
    selection: float
    """Everything that runs inside the stages' hooks in the prefill (see `SelectionMeter`)."""
    prefill: float
    """The rest of the time to the first token: decoder layers, the engine's own work, LM head, and what `generate` does
    before the first forward."""
    decode: float
    """All later forwards, including the stages' decisions in them."""

    @property
    def first_token(self) -> float:
        """Seconds from the call of `generate` to the end of the first forward."""
        return self.vision + self.selection + self.prefill

    @property
    def total(self) -> float:
        """Seconds to the first token and of all decode steps."""
        return self.first_token + self.decode


class Stopwatch:
    """Times one `generate` of a model, which may encode images before or inside its first forward.

    On a GPU it synchronises at every reading of the clock.
    """

    def __init__(self, backbone: Backbone, meter: SelectionMeter | None = None) -> None:
        """`meter` measures all stages of the attached policy, if there is one."""
        self._backbone, self._meter = backbone, meter
        self._forwards: list[float] = []
        self._vision = self._selection = self._started = 0.0
        self._encoding = False

    def split(self, run: Callable[[], object]) -> Split:
        """Call `run`, which generates once, and return its time by part."""
        self._forwards.clear()
        self._vision = self._selection = 0.0

        def from_the_call() -> None:
            self._started = self._now()
            run()

        with self._watched():
            if self._meter is None:
                from_the_call()
            else:
                self._meter.measure(from_the_call)
        first, *others = self._forwards
        selection = min(self._selection, first)
        vision = min(self._vision, first - selection)  # overlapping time counts once
        return Split(vision, selection, first - selection - vision, sum(others))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        model, core = self._backbone.model, self._backbone.core
        handles = [
            model.register_forward_pre_hook(self._before, prepend=True),  # includes what the engine does first
            model.register_forward_hook(self._after),
        ]
        try:
            with wrapped(features_of(core), self._timed):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, model: Any, args: Any) -> None:  # noqa: ARG002  # the signature of a forward hook
        if self._forwards:  # the time to the first token begins at the call
            self._started = self._now()

    def _after(self, model: Any, args: Any, output: Any) -> None:  # noqa: ARG002
        self._forwards.append(self._now() - self._started)
        if len(self._forwards) == 1:
            self._selection = self._selected

    def _timed(self, features: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._encoding:  # a model may encode videos with its method for images
                return features(*args, **kwargs)
            start, selected, self._encoding = self._now(), self._selected, True
            try:
                return features(*args, **kwargs)
            finally:
                self._vision += self._now() - start - (self._selected - selected)
                self._encoding = False

        return timed

    @property
    def _selected(self) -> float:
        return 0.0 if self._meter is None else self._meter.elapsed

    def _now(self) -> float:
        device = self._backbone.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def features_of(core: Any) -> list[tuple[Any, str]]:
    """Return the methods that encode images and videos in a core, as pairs of owner and name."""
    return [(core, name) for name in (f"get_{one}_features" for one in MODALITIES) if hasattr(core, name)]


@contextmanager
def wrapped(
    methods: Sequence[tuple[Any, str]], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Wrap methods of modules inside the block, and restore them afterwards."""
    own = [(owner, name, owner.__dict__.get(name)) for owner, name in methods]
    for owner, name, _ in own:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(wrap(original)))  # models inspect the signatures
    try:
        yield
    finally:
        for owner, name, before in own:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

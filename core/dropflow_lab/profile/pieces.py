"""The pieces of a profile, which several processes may share: of each batch, its layers, its exits and its entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dropflow.backbone.backbone import backbone_for
from dropflow.policy.policy import Policy, policy_from_dict
from dropflow_lab.inputs.data import Sample
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.profile.layers import LayerMeter, other_pictures
from dropflow_lab.profile.settings import Settings, distances
from dropflow_lab.profile.sweep import Answers, Tally, end_tokens, generate
from dropflow_lab.store.digests import digest_of_code, digest_of_questions, digest_of_weights
from dropflow_lab.store.finished import Finished

_INSTRUMENTS = tuple(f"dropflow_lab.profile.{name}" for name in ("layers", "measures", "observe", "pieces", "sweep"))
Piece = dict[str, Any]
"""Plain data: `layers`, values by measure; or `tallies`, of each policy of a sweep."""


class Pieces:
    """Measures the pieces of one profile; each raises `claims.Taken` where another process is at it."""

    def __init__(
        self, model: Any, processor: Any, samples: Sequence[Sample], settings: Settings, finished: Finished
    ) -> None:
        self._model, self._processor, self._samples = model, processor, samples
        self._settings, self._finished = settings, finished
        self._others, self._ends = other_pictures(samples), end_tokens(model)
        layers = backbone_for(model).shape.layers
        self._distances = distances(layers)
        self._exits = [None, *(_one_stage("hidrop/early-exit", x) for x in range(layers))]
        self._entries = [_one_stage("hidrop/late-injection", e) for e in range(1, layers)]
        self._facts = {
            "weights": digest_of_weights(model),
            "questions": digest_of_questions(samples),
            "settings": asdict(settings),
            "code": digest_of_code((*self._exits, *self._entries), _INSTRUMENTS),
        }
        self._dense: tuple[int, Any, Answers] | None = None

    def all(self) -> Iterator[Callable[[], Piece]]:
        """What measures each piece, three for every batch: its layers, its exits, its entries."""
        for start in range(0, len(self._samples), self._settings.batch_size):
            yield partial(self._once, "layers", start, partial(self._layers, start))
            yield partial(self._once, "exits", start, partial(self._sweep, start, self._exits))
            yield partial(self._once, "entries", start, partial(self._sweep, start, self._entries))

    def _once(self, name: str, start: int, measure: Callable[[], Piece]) -> Piece:
        return self._finished.once(f"{name}-{start}", self._facts | {"start": start}, measure, dict, dict)

    def _batch(self, start: int) -> Sequence[Sample]:
        return self._samples[start : start + self._settings.batch_size]

    def _layers(self, start: int) -> Piece:
        batch, meter = self._batch(start), LayerMeter(self._model, self._processor, self._settings.top, self._distances)
        meter.measure(batch)
        others = [None if j is None else self._samples[j] for j in self._others[start : start + len(batch)]]
        meter.measure_across(batch, others, self._samples[0])
        return {"layers": meter.values()}

    def _sweep(self, start: int, policies: Sequence[Policy | None]) -> Piece:
        """Answers of one batch under each policy (`None`: without one), compared with those without a policy."""
        batch, tokens = self._batch(start), self._settings.max_new_tokens
        if self._dense is None or self._dense[0] != start:
            inputs = build_inputs(self._processor, [(sample.images(), sample.question) for sample in batch])
            inputs = inputs.to(self._model.device, self._model.dtype)
            self._dense = start, inputs, generate(self._model, self._processor, inputs, None, tokens)
        _, inputs, dense = self._dense
        tallies = []
        for policy in policies:
            given = dense if policy is None else generate(self._model, self._processor, inputs, policy, tokens)
            tallies.append(Tally())
            tallies[-1].add(batch, dense, given, self._ends)
        return {"tallies": [asdict(tally) for tally in tallies]}


def _one_stage(use: str, at: int) -> Policy:
    return policy_from_dict({"name": f"{use.replace('/', '-')}-at-{at}", "stages": {"sweep": {"use": use, "at": at}}})

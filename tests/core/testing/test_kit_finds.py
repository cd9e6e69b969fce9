"""The kit names what a faulty stage does wrong: the guarantee, the sample, the layer, and where to look."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dropflow import (
    Budget,
    CacheCall,
    CacheKeep,
    CacheSelect,
    Encode,
    EncodeCall,
    Forecast,
    Keep,
    PruneCall,
    Stage,
    StepCall,
    hookimpl,
)
from dropflow.engine.decoder.step_reading import StepReading
from dropflow.testing import BrokenGuarantee, assert_stage_conforms, tiny_models

LLAVA = {"llava": tiny_models()["llava"]}


class Decides(Stage[Any]):
    """Evicts from layer 2 at every decode step; a subclass says what stays."""

    taps = (2,)
    decode_every = 1

    def stays(self, call: CacheCall) -> torch.Tensor:
        raise NotImplementedError

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep | None:
        return CacheKeep({2: self.stays(call)}) if call.step else None


class EvictsByNeighbours(Decides):
    def stays(self, call: CacheCall) -> torch.Tensor:
        view = call.layers[2]
        return (view.image_id >= 0).cumsum(1) <= 3 * len(view.index)


class LeaksBetweenSamples(Decides):
    def stays(self, call: CacheCall) -> torch.Tensor:
        scores = call.attention_rows(2, call.last_rows).mean((1, 2))
        return scores >= scores.mean()


class CountsItsCalls(Decides):
    calls = 0

    def stays(self, call: CacheCall) -> torch.Tensor:
        self.calls += 1
        return (call.layers[2].image_id >= 0).cumsum(1) <= 20 - self.calls


class Fixed(Decides):
    def stays(self, call: CacheCall) -> torch.Tensor:
        return (call.layers[2].image_id >= 0).cumsum(1) <= 9 - call.step


class Reads(Stage[Any]):
    """Reads some entries from layer 2 on at every decode step; a subclass says how many."""

    decode_reads_at = (2,)

    def count(self, call: StepCall) -> int:
        return 2 + call.step

    @hookimpl
    def decode_cache(self, call: StepCall) -> CacheSelect:
        return CacheSelect(call.visual.cumsum(1) <= self.count(call))


class ReadsByNeighbours(Reads):
    def count(self, call: StepCall) -> int:
        return 2 * len(call.visual)


class ReadsByCalls(Reads):
    calls = 0

    def count(self, call: StepCall) -> int:  # noqa: ARG002
        self.calls += 1
        return self.calls % 7


class RemembersPrompts(Stage[Any]):
    prune_at = (2,)
    calls = 0

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        self.calls += 1
        return Keep((call.image_id >= 0).cumsum(1) <= self.calls)


class KeepsEvenPlaces(Stage[Any]):
    """Where a token lies in the batch depends on the padding, and so on the neighbours."""

    prune_at = (2,)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        return Keep(call.index % 2 == 0)


class Promises(Stage[Any]):
    def forecast(self) -> Forecast:
        return Forecast(keeps={2: Budget(tokens=5)})

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        return Keep((call.image_id >= 0).cumsum(1) <= 3)


class NeedsANorm(Stage[Any]):
    prune_at = (2,)

    @hookimpl
    def prune(self, call: PruneCall) -> None:
        assert call.final_norm is not None
        call.final_norm(call.hidden)


class NeedsRotary(Stage[Any]):
    prune_at, taps = (2,), (1,)

    @hookimpl
    def prune(self, call: PruneCall) -> None:
        call.rotary(1)


class NeedsAGrid(Stage[Any]):
    @hookimpl
    def encode(self, call: EncodeCall) -> None:
        for grid in call.grids:
            assert grid is not None


class NeedsCls(Stage[Any]):
    vision_taps = (0,)
    needs = frozenset({"vision_layers"})

    @hookimpl
    def encode(self, call: EncodeCall) -> None:
        call.cls_attention(0)


class WantsWholeImages(Stage[Any]):
    def forecast(self) -> Forecast:
        return Forecast(encoded="data")

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        last = [rows[15].sum() for rows in call.features]  # there may be fewer
        return Encode(keep=tuple(rows.sum(1) >= own for rows, own in zip(call.features, last, strict=True)))


DECODING = (
    r"x llava: guarantee 3 \(batch invariance\) is broken: while decoding, sample 0 has other entries in the cache "
)
FACTS = r"x llava: guarantee 5 .*: on a model without the fact '{}', which the stage does not list in `needs`, it fails"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (EvictsByNeighbours, DECODING + r"of layer 2 after step 1 alone than in the batch; check what `dec"),
        (LeaksBetweenSamples, DECODING + r"of layer 2 after step \d alone"),
        (CountsItsCalls, r"guarantee 4 .*: a second, equal generation gives sample \d other entries .* layer 2 after"),
        (ReadsByNeighbours, r"guarantee 3 .*: while decoding, sample 0 has read other entries in layer 2 in step 1"),
        (ReadsByCalls, r"guarantee 4 .*: a second, equal generation gives sample \d read other entries in layer"),
        (RemembersPrompts, r"guarantee 4 .*: a second, equal call keeps other tokens of sample 0 from layer 2 on"),
        (KeepsEvenPlaces, r"guarantee 3 \(batch invariance\) is broken"),
        (Promises, r"guarantee 5 .*: 5 visual tokens are forecast for image 0 \(sample 0, 16 patches\) in layer 2,"),
        (NeedsANorm, FACTS.format("final_norm")),
        (NeedsRotary, FACTS.format("rotary")),
        (NeedsAGrid, FACTS.format("grid")),
        (NeedsCls, FACTS.format("cls")),
        (WantsWholeImages, r"\(beside an encode and a prune stage\): guarantee 5 .*: neither runs nor is refused: Ind"),
    ],
)  # fmt: skip
def test_what_breaks_a_guarantee_is_named(stage: type[Stage[Any]], message: str) -> None:
    with pytest.raises(BrokenGuarantee, match=message):
        assert_stage_conforms(stage, models=LLAVA)


@pytest.mark.parametrize("stage", [Fixed, Reads])
def test_a_stage_that_decides_by_its_payload_alone_conforms(stage: type[Stage[Any]]) -> None:
    (cell,) = assert_stage_conforms(stage, models=LLAVA)
    assert cell.outcome == "run"
    assert (cell.detail == "") == (stage is Reads)  # what it reads can be compared with the oracle


def test_a_step_that_does_not_read_what_was_chosen_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = StepReading.of
    monkeypatch.setattr(StepReading, "of", lambda *given: decide(*given) and None)
    with pytest.raises(BrokenGuarantee, match=r"guarantee 2 .*: from decode step \d on"):
        assert_stage_conforms(Reads, models=LLAVA)


def test_a_class_that_is_no_stage_is_named() -> None:
    with pytest.raises(BrokenGuarantee, match=r"Budget'>: expected the name of a stage or a subclass of"):
        assert_stage_conforms(Budget, models=LLAVA)  # type: ignore[arg-type]  # what the test is about

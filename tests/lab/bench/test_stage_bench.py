"""The stage benchmark: every shipped stage, selection metered apart from the engine, no map of all tokens."""

from __future__ import annotations

import time
from importlib.metadata import distribution

import pytest
import torch

import dropflow
from dropflow import Keep, PruneCall, Stage, hookimpl
from dropflow_lab.bench.random_llava import SubjectShape, build_model, build_prompt, prefill_of, twin
from dropflow_lab.bench.stages import MEASURED, POLICIES, StageBench, bench_stages
from dropflow_lab.measure.selection_cost import metered

GROUP = "dropflow.stages"
TOY = SubjectShape(
    layers=16, hidden=32, intermediate=64, heads=2, image_side=12, text_tokens=16, vocabulary=32, vision_layers=3
)
SMALL = SubjectShape(layers=3, hidden=32, intermediate=64, heads=2, image_side=4, text_tokens=4, vocabulary=32)


@pytest.fixture(scope="module")
def measured() -> StageBench:
    return bench_stages(TOY, rounds=2)


def test_every_shipped_stage_has_a_row(measured: StageBench) -> None:
    """But for stages that need training, and those of other benchmarks.

    The video benchmark has stages for a packed tower and for videos, the decode benchmark those that only read less.
    """
    shipped = {point.name: point.load() for point in distribution("dropflow").entry_points.select(group=GROUP)}
    measurable = {name for name, kind in shipped.items() if "units" not in kind.needs and not kind.needs_training}
    assert {row.stage for row in measured.rows} == {
        name for name in measurable if not {"reads_videos", "decode_reads_at"} & vars(shipped[name]).keys()
    }
    assert [row.policy for row in measured.rows] == list(POLICIES)


def test_no_stage_allocates_a_map_of_all_tokens(measured: StageBench) -> None:
    assert measured.square_map == (144 + 16) ** 2
    largest = {row.policy: row.largest_tensor for row in measured.rows}
    assert largest.pop("saliency and coverage to 192") == 144**2, "its rule compares each patch with every other"
    assert max(largest.values()) < measured.square_map / 2
    assert largest["keep-all"] == 160  # its mask, over text and visual tokens
    assert largest["late injection at 8"] == largest["early exit at 24"] == 0
    assert largest["pyramid of HiDrop at 64"] == 160 * 32  # keys (or normed states) of all live tokens, nothing wider


def test_a_stage_that_forms_the_map_is_seen() -> None:
    class Square(Stage[dropflow.StageOptions]):
        prune_at = (1,)

        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            rows = torch.arange(call.index.shape[1])[None]
            return Keep(call.attention_rows(1, rows)[0, 0].sum(0)[None] >= 0)

    model = build_model(SMALL)
    which = {"name": "square", "stages": {"s": {"use": Square}}}
    with torch.no_grad(), metered(model, which, "s") as meter:
        meter.watch(prefill_of(model, build_prompt(SMALL)))
    assert meter.largest_tensor >= (16 + 4) ** 2 * 2  # two heads


def test_the_clock_runs_in_the_measured_stage_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def waiting(seconds: float) -> type[Stage[dropflow.StageOptions]]:
        class Waits(Stage[dropflow.StageOptions]):
            prune_at = (1, 2)

            @hookimpl
            def prune(self, call: PruneCall) -> None:  # noqa: ARG002
                now[0] += seconds

            @hookimpl
            def inject(self, call: dropflow.WindowCall) -> int:  # noqa: ARG002
                now[0] += seconds / 2
                return 0

        return Waits

    model = build_model(SMALL)
    stages = {"slow": {"use": waiting(10)}, "other": {"use": waiting(1000)}}
    with torch.no_grad(), metered(model, {"name": "two", "stages": stages}, "slow") as meter:
        meter.measure(prefill_of(model, build_prompt(SMALL)))
        meter.measure(prefill_of(model, build_prompt(SMALL)))
    # `inject` is asked of all stages in one go
    assert meter.seconds == [2 * 10 + 5 + 500] * 2


def test_taps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))

    class Taps(Stage[dropflow.StageOptions]):
        prune_at = (1,)
        taps = (0,)

        @hookimpl
        def prune(self, call: PruneCall) -> None:
            call.attention_rows(0, call.instruction_slots)

    model = build_model(SMALL)
    with torch.no_grad(), metered(model, {"name": "tap", "stages": {"t": {"use": Taps}}}, "t") as meter:
        meter.measure(prefill_of(model, build_prompt(SMALL)))
    # opening the tap, seeing q and k, closing it, and the hook itself: four stretches of one tick
    assert meter.seconds == [4.0]


def test_a_metered_model_answers_as_under_the_policy_itself() -> None:
    model, inputs = build_model(TOY), build_prompt(TOY)
    name = "filter with budgets, then the cache"
    which = {
        "name": "bench",
        "tuned_for": {"layers": 32, "visual_tokens": 576},
        "rescale": True,
        "stages": POLICIES[name],
    }
    with torch.no_grad():
        other = twin(model)
        with dropflow.attach(other, which):
            expected = other(**inputs).logits
        with metered(model, which, MEASURED) as meter:
            got = []
            meter.measure(lambda: got.append(model(**inputs).logits))
    assert torch.equal(got[0], expected)

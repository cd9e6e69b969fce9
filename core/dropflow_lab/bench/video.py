"""The video benchmark: what the stages for videos, and those on pixels, cost and save on a random Qwen2.5-VL."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

import dropflow
from dropflow.backbone.backbone import backbone_for
from dropflow_lab.bench.random_llava import prefill_of, twin
from dropflow_lab.bench.random_qwen import QwenShape, build_page_prompt, build_qwen, build_video_prompt
from dropflow_lab.measure.flop_count import count_flops
from dropflow_lab.measure.machine import Machine, this_machine, torch_threads
from dropflow_lab.measure.selection_cost import metered
from dropflow_lab.measure.stopwatch import features_of, wrapped
from dropflow_lab.measure.timing import Spread, interleaved, ratio

PAGE = QwenShape(
    layers=1,
    frames=0,
    side=24,
    vision_hidden=512,
    vision_intermediate=1376,
    vision_layers=8,
    full_attention=(3, 7),
)
"""A picture of 576 tokens, 2,304 patches, on a tower of 8 layers of width 512, two of them with full attention."""
BLANK = 0.75
"""Share of the page's columns that are white."""
MEASURED = "measured"
"""Name of the measured stage in every policy of the benchmark."""
_TREE = {"use": "flashvid/tree-merging", "retention": 0.25, "events": False, "fewest_segments": 4}
_FOLD = {"use": "holitom/merging", "retention": 0.25, "threshold": 0.8}
VIDEO_POLICIES: dict[str, dict[str, dict[str, Any]]] = {
    "EVS at 25 %": {MEASURED: {"use": "evs/retention", "rate": 0.75}},
    "VidCom2 at 25 %": {MEASURED: {"use": "vidcom2/frame-compensation", "retention": 0.25}},
    "DyCoke at 0.7": {MEASURED: {"use": "dycoke/temporal", "drop": 0.7}},
    "FlashVID at 25 %, merging": {MEASURED: _TREE, "rank": {"use": "flashvid/late-rank", "at": 11, "keep": 0.3}},
    "FlashVID at 25 %, late": {"merge": _TREE, MEASURED: {"use": "flashvid/late-rank", "at": 11, "keep": 0.3}},
    "HoliTom at 25 %, merging": {MEASURED: _FOLD, "fold": {"use": "holitom/folding", "at": 10, "keep": 0.5}},
    "HoliTom at 25 %, folding": {"merge": _FOLD, MEASURED: {"use": "holitom/folding", "at": 10, "keep": 0.5}},
    "every fourth time step": {MEASURED: {"use": "control/frames", "keep": 0.25}},
}
"""Stages of each measured policy on the video."""
PIXEL_POLICIES: dict[str, dict[str, dict[str, Any]]] = {
    "PixelPrune": {MEASURED: {"use": "pixelprune/predict"}},
    "PixelPrune's baseline": {MEASURED: {"use": "pixelprune/components", "skip": 1.0}},
}
"""Stages of each measured policy on the page."""


@dataclass(frozen=True)
class VideoRow:
    """One stage under one policy, on the video."""

    stage: str
    policy: str
    """The measured policy, a key of `VIDEO_POLICIES`."""
    entry_share: float
    """Visual tokens at entry to the LLM, as a share of all."""
    prefill_speedup: Spread
    """Of the whole prefill: tower, selection and LLM."""
    flops_ratio: float
    """FLOPs of the prefill without the policy over those with it, selection included."""
    efficiency: Spread
    """Speed-up divided by the FLOPs ratio: 1 if time falls in proportion to FLOPs."""
    selection_share_of_dense_prefill: Spread
    """Time of this stage's selection (see `SelectionMeter`) over the prefill without a policy in the same round."""
    largest_tensor: int
    """Elements of the largest tensor that this stage's selection allocates."""


@dataclass(frozen=True)
class Shorter:
    """A video of a quarter of the frames, without a policy: how far time falls with FLOPs on this machine at all."""

    prefill_speedup: Spread
    flops_ratio: float
    efficiency: Spread
    """Speed-up divided by the FLOPs ratio, as in `VideoRow`, which no policy that leaves a quarter can be far above."""


@dataclass(frozen=True)
class EncoderRow:
    """One stage on pixels, on the page; of the vision encoder alone, selection included."""

    stage: str
    policy: str
    """The measured policy, a key of `PIXEL_POLICIES`."""
    kept_share: float
    """Units that the tower runs on, as a share of all."""
    encoder_speedup: Spread
    flops_ratio: float
    efficiency: Spread
    """Speed-up of the encoder divided by the ratio of its FLOPs."""
    token_efficiency: Spread
    """Speed-up of the encoder divided by the ratio of its tokens."""
    selection_share_of_dense_encoder: Spread


@dataclass(frozen=True)
class VideoBench:
    """Results of the video benchmark: CPU time of this process, medians with quartiles over rounds."""

    rows: tuple[VideoRow, ...]
    shorter: Shorter
    encoder: tuple[EncoderRow, ...]
    dense_prefill_seconds: Spread
    dense_encoder_seconds: Spread
    rounds: int
    video: QwenShape
    page: QwenShape
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with the policies."""
        return asdict(self) | {"policies": VIDEO_POLICIES | PIXEL_POLICIES}


def bench_video(
    video: QwenShape | None = None, page: QwenShape | None = None, *, rounds: int = 9, threads: int = 1
) -> VideoBench:
    """Measure all policies in turn in this process, on shared random weights; takes most of a minute per round.

    Torch's number of threads is set for the duration of the measurement.
    """
    video, page = video or QwenShape(), page or PAGE
    with torch_threads(threads), torch.no_grad():
        rows, shorter, prefill = _videos(video, rounds)
        encoder, encoding = _pages(page, rounds)
        return VideoBench(rows, shorter, encoder, prefill, encoding, rounds, video, page, this_machine())


def _videos(shape: QwenShape, rounds: int) -> tuple[tuple[VideoRow, ...], Shorter, Spread]:
    with ExitStack() as attached:
        plain, inputs = build_qwen(shape), build_video_prompt(shape)
        runs: dict[str, Callable[[], object]] = {"dense": prefill_of(plain, inputs)}
        runs["shorter"] = prefill_of(plain, build_video_prompt(replace(shape, frames=shape.frames // 4)))
        dense_flops = count_flops(runs["dense"])
        fewer = dense_flops / count_flops(runs["shorter"])
        meters, facts = {}, {}
        for name, stages in VIDEO_POLICIES.items():
            model = twin(plain)
            facts[name] = _facts(model, stages, inputs, dense_flops)
            meter = attached.enter_context(metered(model, _policy(stages), MEASURED, time.process_time))
            meter.watch(prefill_of(model, inputs))
            meters[name], runs[name] = meter, partial(meter.measure, prefill_of(model, inputs))
        seconds = interleaved(runs, rounds, clock=time.process_time)
    dense, rows = seconds["dense"], []
    for name, (entry, flops_ratio) in facts.items():
        speedup = ratio(dense, seconds[name])
        rows.append(
            VideoRow(
                stage=str(VIDEO_POLICIES[name][MEASURED]["use"]),
                policy=name,
                entry_share=entry / shape.visual_tokens,
                prefill_speedup=speedup,
                flops_ratio=flops_ratio,
                efficiency=speedup.over(flops_ratio),
                selection_share_of_dense_prefill=ratio(meters[name].seconds[1:], dense),  # without the warm-up round
                largest_tensor=meters[name].largest_tensor,
            )
        )
    speedup = ratio(dense, seconds["shorter"])
    return tuple(rows), Shorter(speedup, fewer, speedup.over(fewer)), Spread.of(dense)


def _facts(model: Any, stages: Mapping[str, Any], inputs: Mapping[str, Any], dense_flops: int) -> tuple[float, float]:
    """Return visual tokens at entry, and the ratio of FLOPs, of one prefill under a policy."""
    with dropflow.attach(model, _policy(stages)) as flow:
        flops = count_flops(prefill_of(model, inputs))
        return float(flow.report().entry_visual_tokens), dense_flops / flops


def _pages(shape: QwenShape, rounds: int) -> tuple[tuple[EncoderRow, ...], Spread]:
    with ExitStack() as attached:
        plain, inputs = build_qwen(shape), build_page_prompt(shape, BLANK)
        models = {name: twin(plain) for name in PIXEL_POLICIES}  # before the encoder of `plain` is wrapped
        dense = attached.enter_context(_encoder_of(plain))
        runs: dict[str, Callable[[], object]] = {"dense": partial(dense.measure, prefill_of(plain, inputs))}
        dense_flops = dense.flops(prefill_of(plain, inputs))
        meters, encoders, facts = {}, {}, {}
        for name, model in models.items():
            stages = PIXEL_POLICIES[name]
            kept = _kept(model, stages, inputs)
            meters[name] = attached.enter_context(metered(model, _policy(stages), MEASURED, time.process_time))
            encoders[name] = encoder = attached.enter_context(_encoder_of(model))
            prefill = prefill_of(model, inputs)
            facts[name] = kept, dense_flops / encoder.flops(prefill)
            runs[name] = partial(encoder.measure, partial(meters[name].measure, prefill))
        interleaved(runs, rounds, clock=time.process_time)
    seconds, rows = dense.seconds[1:], []  # without the warm-up round
    for name, (kept, flops_ratio) in facts.items():
        speedup = ratio(seconds, encoders[name].seconds[1:])
        rows.append(
            EncoderRow(
                stage=str(PIXEL_POLICIES[name][MEASURED]["use"]),
                policy=name,
                kept_share=kept / shape.visual_tokens,
                encoder_speedup=speedup,
                flops_ratio=flops_ratio,
                efficiency=speedup.over(flops_ratio),
                token_efficiency=speedup.over(shape.visual_tokens / kept),
                selection_share_of_dense_encoder=ratio(meters[name].seconds[1:], seconds),
            )
        )
    return tuple(rows), Spread.of(seconds)


def _kept(model: Any, stages: Mapping[str, Any], inputs: Mapping[str, Any]) -> float:
    """Return the units that the tower runs on under a policy."""
    with dropflow.attach(model, _policy(stages)) as flow:
        prefill_of(model, inputs)()
        return flow.report().tower_visual_tokens or float("nan")


class _Encoder:
    """Times the vision encoder inside prefills."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._elapsed = 0.0
        self._counts, self._flops = False, 0

    def measure(self, run: Callable[[], object]) -> None:
        """Run once and record the encoder's seconds."""
        self._elapsed = 0.0
        run()
        self.seconds.append(self._elapsed)

    def flops(self, run: Callable[[], object]) -> int:
        """Run once and return the encoder's FLOPs; slow."""
        self._counts = True
        run()
        self._counts = False
        return self._flops

    def around(self, features: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the method of a model that encodes."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._counts:
                found: list[Any] = []
                self._flops = count_flops(lambda: found.append(features(*args, **kwargs)))
                return found[0]
            start = time.process_time()
            try:
                return features(*args, **kwargs)
            finally:
                self._elapsed += time.process_time() - start

        return watched


@contextmanager
def _encoder_of(model: Any) -> Iterator[_Encoder]:
    encoder = _Encoder()
    images = [one for one in features_of(backbone_for(model).core) if "image" in one[1]]
    with wrapped(images, encoder.around):
        yield encoder


def _policy(stages: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "bench", "stages": stages}

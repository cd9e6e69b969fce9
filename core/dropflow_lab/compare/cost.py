"""What a policy costs and saves: FLOPs by formula and by counter, KV bytes, peak memory, and time by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track

import dropflow
from dropflow import Flow, Policy
from dropflow.backbone.backbone import Backbone, backbone_for
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow_lab.inputs.data import Sample
from dropflow_lab.inputs.frames import stating_videos
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.measure.flop_count import count_flops
from dropflow_lab.measure.memory import peak_bytes
from dropflow_lab.measure.prefill import dense_flops
from dropflow_lab.measure.selection_cost import SelectionMeter
from dropflow_lab.measure.stopwatch import Split, Stopwatch, features_of, wrapped
from dropflow_lab.measure.timing import Spread, no_garbage_collection, ratio

NEW_TOKENS = 8
"""Tokens generated in every timed call, so that all policies decode the same number of tokens."""


@dataclass(frozen=True)
class Work:
    """FLOPs (multiply-adds) and bytes, as means over the measured questions, each run in a batch of one."""

    flops_formula: float
    """Decoder layers of the prefill by closed formula, ranking left out (`dropflow.flops.layer`)."""
    flops_counted: float
    """The same, counted while the decoder runs, without the selection inside it."""
    flops_selection: float
    """Selection (ranking and merging) in the prefill, counted."""
    flops_vision: float
    """Vision tower and projector, counted, without selection."""
    kv_bytes: float
    """Keys and values that the cache actually holds after the prefill."""
    kv_bytes_end: float
    """The same after an answer of `NEW_TOKENS` tokens, where stages may have evicted entries at decode steps."""
    peak_bytes: float
    """Peak bytes allocated during the prefill, beyond the model itself."""
    kv_bytes_read: float = 0.0
    """Keys and values that a decode step reads, as the mean over the steps of that answer: what its caches hold, unless
    stages choose."""


@dataclass(frozen=True)
class Parts:
    """Time of one round by part, as shares of the round's total time without a policy; no part is negative."""

    vision: float
    """Vision tower and projector."""
    selection: float
    """The stages' computation in the prefill."""
    prefill: float
    """The rest of the time to the first token."""
    decode: float
    """All decode steps after the first token."""
    total: float
    """The sum of the four."""


@dataclass(frozen=True)
class Times:
    """Ratios to the model without a policy in the same round."""

    total: Spread
    """Time of one `generate`: to the first token, and of all decode steps."""
    prefill: Spread
    """Time from the call to the first token, vision and selection included."""
    decode: Spread
    """Time of the decode steps."""
    parts: Parts
    """Parts of the round with the median total (the lower of two), so that they add up to a total."""


@dataclass(frozen=True)
class Cost:
    """Work and time of one policy, and the work without one."""

    work: Work
    dense: Work
    times: Times | None
    """`None` where nothing was timed."""
    questions: int
    rounds: int


def measure_cost(
    model: Any,
    processor: Any,
    policy: Policy | None,
    samples: Sequence[Sample],
    *,
    rounds: int,
    dense: Work | None = None,
) -> Cost:
    """Measure a policy (`None`: the model without one) on some questions, one at a time.

    Every timed call under the policy is paired with one without it, in alternating order, over `rounds` rounds (0:
    nothing is timed). Work is counted in separate calls, since counting slows them down. `dense` is the work without a
    policy on the same questions, if it is already known.
    """
    backbone = backbone_for(model)
    name = "dense" if policy is None else policy.name
    prompts = [
        (build_inputs(processor, [(one.images(), one.question)]).to(model.device, model.dtype), one) for one in samples
    ]
    with torch.no_grad():
        dense = dense or _work(backbone, None, prompts)
        work = dense if policy is None else _work(backbone, policy, prompts)
        splits: list[tuple[Split, Split]] = []
        with no_garbage_collection():
            for number in track(range(rounds + 1), f"{name}: time", disable=not rounds):
                for prompt, sample in prompts if rounds else ():
                    with _stating(prompt, sample):
                        pair = _pair(backbone, policy, prompt, swap=bool(number % 2))
                    if number:  # the first round warms up
                        splits.append(pair)
    return Cost(work, dense, _times(splits, len(prompts)) if splits else None, len(samples), rounds)


def _pair(backbone: Backbone, policy: Policy | None, prompt: Any, *, swap: bool) -> tuple[Split, Split]:
    """One timed call under the policy and one without, the latter first if `swap` is set."""
    order = (None, policy) if swap else (policy, None)
    found = [_split(backbone, which, prompt) for which in order]
    return (found[1], found[0]) if swap else (found[0], found[1])


def _split(backbone: Backbone, policy: Policy | None, prompt: Any) -> Split:
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    with _attached(backbone, policy) as (_, meter):
        return Stopwatch(backbone, meter).split(lambda: backbone.model.generate(**prompt, **options))


@contextmanager
def _stating(prompt: Any, sample: Sample) -> Iterator[None]:
    """State question and videos of a prompt."""
    with dropflow.questions([sample.question]), stating_videos(prompt, [sample]):
        yield


def _work(backbone: Backbone, policy: Policy | None, prompts: Sequence[tuple[Any, Sample]]) -> Work:
    found = []
    for prompt, sample in prompts:
        with _stating(prompt, sample):
            found.append(_work_of(backbone, policy, prompt))
    return Work(**{name: sum(getattr(one, name) for one in found) / len(found) for name in Work.__dataclass_fields__})


def _work_of(backbone: Backbone, policy: Policy | None, prompt: Any) -> Work:
    def answer(tokens: int) -> Any:
        options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
        return getattr(backbone.model.generate(**prompt, **options, return_dict_in_generate=True), CACHE_ARGUMENT)

    def prefill() -> Any:
        return answer(1)

    with _attached(backbone, policy) as (flow, meter):
        at_the_end = _held(answer(NEW_TOKENS))
        read = None if flow is None or flow.plan.idle else flow.report().kv_bytes_read
        cache = prefill()
        counts = _counted(backbone, meter, prefill)
        return Work(
            flops_formula=_formula(flow, backbone, prompt),
            flops_counted=counts.decoder / 2,
            flops_selection=counts.selection / 2,
            flops_vision=counts.vision / 2,
            kv_bytes=_held(cache),
            kv_bytes_end=at_the_end,
            peak_bytes=peak_bytes(prefill, backbone.model.device),
            kv_bytes_read=_read(backbone, _held(cache), at_the_end) if read is None else read,
        )


def _read(backbone: Backbone, before: float, after: float) -> float:
    """Return the mean bytes that a step of an answer reads that reads everything, given what was held around it."""
    shape, steps = backbone.shape, NEW_TOKENS - 1
    held = before + (after - before) * (steps + 1) / (2 * steps)
    return held * len(shape.with_attention) / len(shape.holding)


def _formula(flow: Flow | None, backbone: Backbone, prompt: Any) -> float:
    if flow is not None and not flow.plan.idle:
        return flow.report().flops
    return dense_flops(backbone, int(prompt["attention_mask"].sum()))


@dataclass
class _Counts:
    """FLOPs of one prefill, a multiply-add counted as two."""

    decoder: int = 0
    vision: int = 0
    selection: int = 0


def _counted(backbone: Backbone, meter: SelectionMeter | None, run: Callable[[], object]) -> _Counts:
    """Count the forwards of decoder and vision encoder, and the selection inside them separately."""
    counts = _Counts()

    def selected() -> int:
        return 0 if meter is None else meter.flops

    def count(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            before, outputs = selected(), []
            total = count_flops(lambda: outputs.append(call(*args, **kwargs)))
            setattr(counts, part, getattr(counts, part) + total - (selected() - before))
            return outputs[0]

        return counted

    with ExitStack() as stack:
        stack.enter_context(wrapped([(backbone.text, "forward")], lambda call: count("decoder", call)))
        stack.enter_context(wrapped(features_of(backbone.core), lambda call: count("vision", call)))
        run() if meter is None else meter.watch(run)
    counts.selection = selected()
    return counts


@contextmanager
def _attached(backbone: Backbone, policy: Policy | None) -> Iterator[tuple[Flow | None, SelectionMeter | None]]:
    if policy is None:
        yield None, None
        return
    with dropflow.attach(backbone.model, policy) as flow:
        yield flow, SelectionMeter(flow.plan)


def _held(cache: Any) -> int:
    kept = (held for layer in cache.layers for held in (layer.keys, layer.values) if held is not None)
    return sum(held.numel() * held.element_size() for held in kept)


def _times(splits: Sequence[tuple[Split, Split]], prompts: int) -> Times:
    """Sum the questions of each round, and take ratios round by round."""
    rounds = [splits[start : start + prompts] for start in range(0, len(splits), prompts)]
    own = [[pair[0] for pair in pairs] for pairs in rounds]
    dense = [[pair[1] for pair in pairs] for pairs in rounds]

    def sums(of: list[list[Split]], part: Callable[[Split], float]) -> list[float]:
        return [sum(part(split) for split in splits) for splits in of]

    whole = sums(dense, lambda split: split.total)
    total = [a / b for a, b in zip(sums(own, lambda split: split.total), whole, strict=True)]
    median = sorted(range(len(total)), key=total.__getitem__)[(len(total) - 1) // 2]
    return Times(
        total=Spread.of(total),
        prefill=ratio(sums(own, lambda split: split.first_token), sums(dense, lambda split: split.first_token)),
        decode=ratio(sums(own, lambda split: split.decode), sums(dense, lambda split: split.decode)),
        parts=_parts(own[median], whole[median]),
    )


def _parts(splits: Sequence[Split], whole: float) -> Parts:
    names = ("vision", "selection", "prefill", "decode")
    shares = {name: sum(getattr(split, name) for split in splits) / whole for name in names}
    return Parts(**shares, total=sum(shares.values()))

"""Forces the keeps of a trace, regardless of scores: every stage becomes one that repeats its decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from pydantic import Field, InstanceOf
from torch import Tensor

from dropflow import (
    CacheCall,
    CacheKeep,
    CacheSelect,
    Encode,
    EncodeCall,
    Exit,
    Forecast,
    Keep,
    Policy,
    PruneCall,
    Stage,
    StageContext,
    StageOptions,
    StepCall,
    WindowCall,
    hookimpl,
)
from dropflow.errors import DecisionError, PolicyError
from dropflow.lifecycle.stage import EncodeBoundary
from dropflow.policy.policy import StageUse
from dropflow_lab.trace.rows import across_frames, made_again, shares
from dropflow_lab.trace.schema import Trace, TracedBoundary, TracedEncode, TracedEviction, TracedRead, TracedRun

SUFFIX = " (replay)"


@dataclass
class Part:
    """What one stage of a run decided."""

    encodes: dict[EncodeBoundary, TracedEncode] = field(default_factory=dict)
    prunes: dict[int, TracedBoundary] = field(default_factory=dict)
    """Boundaries of the LLM at which it pruned."""
    gone: dict[int, list[set[int]]] = field(default_factory=dict)
    """Per such boundary and image, the patches that it drops."""
    first: set[int] = field(default_factory=set)
    """Boundaries at which it is the first to prune, and enforces `kept`."""
    evictions: dict[int, list[TracedEviction]] = field(default_factory=dict)
    """Evictions by step."""
    reads: dict[int, list[TracedRead]] = field(default_factory=dict)
    """What layers read by step, where they did not read all."""


class ReplayOptions(StageOptions):
    """Options of `Replay`."""

    trace: Trace = Field(exclude=True, description="the trace")
    run: int = Field(0, ge=0, description="which of its runs to replay")
    stage: str = Field(description="the stage of that run that this one replays")
    part: InstanceOf[Part] = Field(exclude=True, description="what that stage decided")


def replay_policy(trace: Trace, run: int = 0) -> Policy:
    """Return a policy that repeats one run of `trace`: the same stages by name, each repeating its decisions.

    Attach it with `dropflow.attach` to the same model and give it the same prompt, or one with its images in the same
    places. Raises `PolicyError` when attached to a model of another depth, or for a run that cannot be repeated.
    """
    if not 0 <= run < len(trace.runs):
        raise PolicyError(f"run: expected 0 to {len(trace.runs) - 1}, got {run}; the trace has {len(trace.runs)} runs")
    traced = trace.runs[run]
    parts = _parts(traced, [len(image.index) for image in trace.prompt.images])
    options = {name: ReplayOptions(trace=trace, run=run, stage=name, part=part) for name, part in parts.items()}
    return Policy(
        name=traced.name.removesuffix(SUFFIX) + SUFFIX,
        stages={name: StageUse("trace/replay", Replay, own) for name, own in options.items()},
        positions=traced.positions,
    )


def original_of(policy: Policy) -> dict[str, Any] | None:
    """Return the policy that was traced, if this one replays a trace."""
    for use in policy.stages.values():
        if isinstance(use.options, ReplayOptions):
            return use.options.trace.runs[use.options.run].policy
    return None


def _parts(run: TracedRun, sizes: Sequence[int]) -> dict[str, Part]:
    """Return what each stage decided, in policy order, stages added by an edit last; `sizes` are patches per image."""
    parts: dict[str, Part] = {name: Part() for name in run.policy.get("stages", {})}
    for step in run.encode:
        parts.setdefault(step.stage, Part()).encodes[step.boundary] = step
    for boundary in run.boundaries:
        kept = list(map(set, boundary.kept))
        for pruning in boundary.by:
            part = parts.setdefault(pruning.stage, Part())
            part.prunes[boundary.boundary] = boundary
            gone = part.gone.setdefault(boundary.boundary, [set() for _ in sizes])
            for own, dropped, stays in zip(gone, pruning.dropped, kept, strict=True):
                own.update(patch for patch in dropped if patch not in stays)
        _obey(boundary, parts, sizes)
    for call in run.calls:
        for eviction in call.evicted:
            parts.setdefault(eviction.stage, Part()).evictions.setdefault(call.step, []).append(eviction)
        for read in call.read:  # of several stages, the first one reads what all of them wanted
            parts.setdefault(read.stages[0], Part()).reads.setdefault(call.step, []).append(read)
    return parts


def _obey(boundary: TracedBoundary, parts: dict[str, Part], sizes: Sequence[int]) -> None:
    """Make the first stage of a boundary also drop what no stage drops and `kept` does not contain."""
    at, first = boundary.boundary, boundary.by[0].stage
    parts[first].first.add(at)
    by_others: list[set[int]] = [set() for _ in sizes]
    for name in {pruning.stage for pruning in boundary.by} - {first}:
        for others, dropped in zip(by_others, parts[name].gone[at], strict=True):
            others.update(dropped)
    for own, size, others, kept in zip(parts[first].gone[at], sizes, by_others, boundary.kept, strict=True):
        own.update(set(range(size)) - others - set(kept))


class Replay(Stage[ReplayOptions]):
    """Repeats what one stage of a trace decided: rows, merges, protection, window, keeps, evictions and reads."""

    Options = ReplayOptions
    summary = "forces the keeps of a trace, regardless of scores"

    def __init__(self, options: ReplayOptions, context: StageContext) -> None:
        super().__init__(options, context)
        self._images, self._attending = options.trace.prompt.images, context.scale.target.with_attention
        self._run = options.trace.runs[options.run]
        depth, name = options.trace.depth, options.stage
        if context.scale.target.layers != depth:
            raise PolicyError(
                f"stages.{name}: the trace was made on a model of {depth} layers (a {options.trace.model}), but this "
                f"one has {context.scale.target.layers}; replay it on the model it was made on"
            )
        self._encodes, self._evictions = options.part.encodes, options.part.evictions
        if any(image.merged is None for step in self._encodes.values() for image in step.images):
            raise PolicyError(
                f"stages.{name}: replaced rows without saying which rows the new ones are made of (`Encode.shares`), "
                "so that they cannot be rebuilt; such a run can be viewed, but not replayed"
            )

    @property
    def ranks(self) -> bool:
        """False: it reads no attention."""
        return False

    @property
    def reads_videos(self) -> bool:
        """Whether the traced stage merged rows or states across frames."""
        return any(map(across_frames, self._encodes.values())) or any(
            merge.images for boundary in self.options.part.prunes.values() for own in boundary.merged for merge in own
        )

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """Where the traced stage decided about rows."""
        return tuple(self._encodes)

    @property
    def decode_every(self) -> int:
        """1, every token, if the traced stage evicted while decoding; else 0."""
        return int(any(self._evictions))

    @property
    def decode_reads_at(self) -> tuple[int, ...]:
        """The first layer that did not read all it held, and those after it, which may have."""
        reads = self.options.part.reads.values()
        first = min((layer for step in reads for read in step for layer in read.layers), default=None)
        return () if first is None else tuple(layer for layer in self._attending if layer >= first)

    def forecast(self) -> Forecast:
        """The traced window and boundaries."""
        run, name = self._run, self.options.stage
        return Forecast(
            entry=run.entry if name in run.entered_by else None,
            exit=run.exit if name in run.exited_by else None,
            keeps=dict.fromkeys(self.options.part.prunes),
        )

    @hookimpl
    def inject(self, call: WindowCall) -> int | None:  # noqa: ARG002  # decided by the trace
        """Return the boundary at which the traced stage let vision enter."""
        return self.forecast().entry

    @hookimpl
    def exit(self, call: WindowCall) -> Exit | None:  # noqa: ARG002  # decided by the trace
        """Return the boundary at which the traced stage let vision exit."""
        at = self.forecast().exit
        return None if at is None else Exit(at, keep_answer_sources=self._run.keep_asking)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        """Rebuild the traced rows."""
        step = self._encodes[call.boundary]
        if len(step.images) != len(call.features):
            raise self._misfit(f"{len(step.images)} images, but this call encodes {len(call.features)}")
        held = [places.tolist() for places in call.places]
        there = {(patch, number) for number, own in enumerate(held) for patch in own}
        for number, image in enumerate(step.images):
            wanted = {(patch, number) for patch in image.kept}
            wanted |= {source for merge in image.merged or () for source in merge.sources(number)}
            if wanted - there:
                patch, own = min(wanted - there)
                raise self._misfit(f"an image {own} with patch {patch}, which is not there")
            after = {p for merge in image.merged or () for p in merge.prefix} - set(range(call.prefix_rows.shape[1]))
            if after:
                raise self._misfit(f"an image {number} with prefix row {min(after)}, which is not there")
        device = call.prefix_rows.device
        protect = tuple(_mask(image.kept, image.protected, device) for image in step.images)
        if not any(image.merged or image.sizes for image in step.images):
            keep = tuple(_mask(own, image.kept, device) for own, image in zip(held, step.images, strict=True))
            return Encode(keep=keep, protect=protect)
        return Encode(
            rows=tuple(
                made_again(call.features, prefix, held, step, number) for number, prefix in enumerate(call.prefix_rows)
            ),
            places=tuple(torch.tensor(image.kept, dtype=torch.long, device=device) for image in step.images),
            sizes=tuple(torch.tensor(image.sizes or [1.0] * len(image.kept), device=device) for image in step.images),
            proportional=step.proportional,
            protect=protect,
            shares=lambda: tuple(
                shares(prefix, held, step, number, call.videos or ()) for number, prefix in enumerate(call.prefix_rows)
            ),
            across_frames=across_frames(step),
        )

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Drop what the traced stage dropped; the first stage of a boundary enforces its `kept`."""
        part, at = self.options.part, call.boundary
        if at in part.first:
            self._check_layout(call)
        gone = [image.index[p] for image, own in zip(self._images, part.gone[at], strict=True) for p in own]
        dropped = torch.tensor(gone, dtype=torch.long, device=call.index.device)
        merged = self._merged(part.prunes[at], call.index) if at in part.first else None
        return Keep(~torch.isin(call.index, dropped), merge_into=merged)

    def _merged(self, boundary: TracedBoundary, index: Int[Tensor, "batch slots"]) -> Int[Tensor, "batch slots"] | None:
        """Return the slot that each slot's state was merged into; `None` if none was."""
        if not any(boundary.merged):
            return None
        into = torch.arange(int(index.max()) + 1, device=index.device)
        for number, (image, merges) in enumerate(zip(self._images, boundary.merged, strict=True)):
            for merge in merges:
                into[[self._images[own].index[p] for p, own in merge.sources(number)]] = image.index[merge.into]
        slot = torch.zeros((len(index), len(into)), dtype=torch.long, device=index.device)
        slot.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        return slot.gather(1, into[index])

    @hookimpl
    def decode_cache(self, call: CacheCall | StepCall) -> CacheKeep | CacheSelect | None:
        """Evict or read the same entries."""
        if isinstance(call, StepCall):
            return self._read(call)
        keeps: dict[int, Bool[Tensor, "batch keys"]] = {}
        for eviction in self._evictions.get(call.step, ()):
            made: dict[int, Tensor] = {}  # one for all layers that hold the same, so that the engine treats them as one
            for number in eviction.layers:
                index = call.layers[number].index
                if id(index) not in made:
                    tokens = torch.tensor(eviction.tokens, dtype=torch.long, device=index.device)
                    made[id(index)] = ~torch.isin(index, tokens)
                keeps[number] = made[id(index)]
        return CacheKeep(keeps) if keeps else None

    def _read(self, call: StepCall) -> CacheSelect | None:
        """Return the entries that the layer read; `None` where it read all."""
        for read in self.options.part.reads.get(call.step, ()):
            if call.layer in read.layers:
                tokens = torch.tensor(read.tokens, dtype=torch.long, device=call.view.index.device)
                return CacheSelect(torch.isin(call.view.index, tokens))
        return None

    def _check_layout(self, call: PruneCall) -> None:
        """Check that live patches are where the trace has patches of the same image, and text is where it has none."""
        if len(call.image_sizes) != len(self._images):
            raise self._misfit(f"{len(self._images)} images, but this prompt has {len(call.image_sizes)}")
        length = 1 + max((i for image in self._images for i in image.index), default=0)
        owner = torch.full((length,), -1, device=call.index.device)
        for number, image in enumerate(self._images):
            owner[image.index] = number
        traced = torch.where(call.index < length, owner[call.index.clamp(max=length - 1)], -1)
        if bool((((call.image_id >= 0) & (call.image_id != traced)) | (call.text & (traced >= 0))).any()):
            raise self._misfit("its images in other places of the prompt than they have here")

    def _misfit(self, what: str) -> DecisionError:
        return DecisionError(
            f"stages.{self.options.stage}: the trace does not fit this prompt: it has {what}; replay it with the "
            "prompt and the pictures it was made from"
        )


def _mask(rows: Sequence[int], chosen: Sequence[int], device: torch.device) -> Bool[Tensor, "rows"]:
    picked = set(chosen)
    return torch.tensor([row in picked for row in rows], dtype=torch.bool, device=device)

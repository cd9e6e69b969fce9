"""The format of trace files, as pydantic models: one prompt, and what each policy did to its visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from dropflow_lab.errors import InputError, shortened
from dropflow_lab.files import write_text
from dropflow_lab.trace.bounds import bounds_faults, prompt_faults

LONGEST = 2**24
"""Most tokens of a prompt, and so the largest number of a token or patch."""
_REMEDY = "give the .json that `dropflow trace` writes next to the page"
_SHOWN_FAULTS = 10

Count = Annotated[int, Field(ge=0, le=LONGEST)]
Numbers = list[Count]
Scores = list[float | None]
"""One number per patch; null where the stage gave none, or none that is finite."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TracedImage(_Part):
    """One image of the prompt: a picture, a tile of a large one, or a frame of a video."""

    index: Numbers = Field(description="logical index, in the prompt, of each patch, row by row of the grid")
    extra: Numbers = Field(
        default=[], description="logical indices of its tokens that are not patches, such as newlines"
    )
    grid: tuple[Count, Count] | None = Field(
        description="rows and columns of patches; null where the backbone cannot tell"
    )


class Merge(_Part):
    """A row of the vision encoder, or a state inside the LLM, that stands for other patches than its own."""

    into: Count = Field(description="patch whose place the row takes")
    of: Numbers = Field(default=[], description="patches whose rows were summed up")
    images: Numbers = Field(
        default=[], description="the image of each of `of`; left out where all are of the row's own image"
    )
    prefix: Numbers = Field(
        default=[], description="prefix rows of the vision encoder, such as 0 for CLS, that were summed up with them"
    )
    shares: list[float] | None = Field(
        default=None, description="weight in the sum of each of `of`, then of each of `prefix`; null for a plain mean"
    )

    @model_validator(mode="after")
    def _summed_up(self) -> Self:
        members = len(self.of) + len(self.prefix)
        if self.images and len(self.images) != len(self.of):
            raise ValueError("expected an image for each of `of`, or no `images`")
        if not members or (self.shares is not None and len(self.shares) != members):
            raise ValueError("expected at least one row in `of` or `prefix`, and a share for each or `shares` null")
        return self

    def sources(self, image: int) -> list[tuple[int, int]]:
        """Return each patch of `of` with its image, for a row of `image`."""
        return list(zip(self.of, self.images or [image] * len(self.of), strict=True))

    @model_serializer(mode="wrap")
    def _short(self, as_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out empty fields: a stage that reorders rows makes a merge of each, in every layer."""
        return {name: value for name, value in as_dict(self).items() if value not in (None, [])}


class EncodedImage(_Part):
    """What one stage left of one image."""

    kept: Numbers = Field(description="patches whose rows are present after the step, ascending")
    merged: list[Merge] | None = Field(
        default=[], description="rows that stand for other patches than their own; null where the stage does not say"
    )
    sizes: list[float] | None = Field(
        default=None, description="patches that each row of `kept` is the mean of; null where no row is new"
    )
    protected: Numbers = Field(default=[], description="patches that no stage may drop from here on")
    scores: Scores | None = Field(default=None, description="what the stage ranked each patch by")


class TracedEncode(_Part):
    """What one stage decided at one boundary of the vision encoder, or on its output."""

    stage: str = Field(description="its name in the policy")
    boundary: int | float | Literal["pixels", "features"] | None = Field(
        description="vision encoder boundary, half a layer on for inside a layer; `pixels` for before the encoder "
        "runs; `features` for what the projector gets; null for the output before the LLM"
    )
    shift: Count = Field(default=0, description="what to add to patch numbers of this step to get those of the prompt")
    proportional: bool = Field(
        default=False, description="whether attention in later layers of the encoder weights each row by its size"
    )
    images: list[EncodedImage]


class Pruning(_Part):
    """What one stage decided at one boundary of the LLM."""

    stage: str = Field(description="its name in the policy")
    dropped: list[Numbers] = Field(
        description="per image: live patches whose tokens it removed, including merged ones, excluding protected ones"
    )
    scores: list[Scores] | None = Field(default=None, description="per image: what it ranked each patch by")


class TracedBoundary(_Part):
    """What was left after one boundary of the LLM at which stages pruned. A replay enforces `kept`."""

    boundary: Count = Field(description="the layer that it precedes")
    kept: list[Numbers] = Field(description="per image: patches that are live from here on")
    by: list[Pruning] = Field(min_length=1, description="the stages that pruned, in policy order")
    merged: list[list[Merge]] = Field(default=[], description="per image: states that became the mean of several")
    merged_by: str | None = Field(default=None, description="the stage that merged; null in older files, too")


class TracedEviction(_Part):
    """Entries that one stage evicted from the caches of some layers in one call."""

    stage: str = Field(description="its name in the policy")
    layers: Numbers
    tokens: Numbers = Field(description="logical indices of the visual tokens whose keys and values were evicted")
    notes: Scores | None = Field(
        default=None, description="what the stage recorded for each of them, such as attention"
    )


class TracedRead(_Part):
    """What some layers read in one decode step, in which they did not read all their entries."""

    stages: list[str] = Field(min_length=1, description="names in the policy of the stages that chose")
    layers: Numbers
    tokens: Numbers = Field(description="logical indices of the visual tokens whose entries were read")
    entries: Count = Field(description="entries that were read, text included")


class TracedCall(_Part):
    """One call of the model: the prefill, or a decode step."""

    step: Count = Field(description="tokens generated before it: 0 for the prefill")
    token: int = Field(description="the token it produced")
    text: str = Field(description="that token as text")
    kv_entries: Numbers = Field(description="entries that each layer's cache holds after the call")
    evicted: list[TracedEviction] = []
    read: list[TracedRead] = Field(default=[], description="layers that did not read all; empty in the prefill")


class TracedLayer(_Part):
    """One decoder layer in the prefill."""

    visual_tokens: Count
    kv_entries: Count = Field(description="entries it wrote in the prefill, text included, before any eviction")
    flops: float = Field(description="multiply-adds, text included, by closed formula")


class TracedRun(_Part):
    """What one policy did."""

    name: str = Field(description="name of the policy")
    policy: dict[str, Any] = Field(description="the policy, as in its YAML file")
    positions: Literal["persistent", "compact"] = "persistent"
    entry: Count = Field(description="boundary from which vision is live")
    exit: Count = Field(description="boundary from which no vision is live; the number of layers for none")
    entered_by: list[str] = Field(default=[], description="stages that set `entry`")
    exited_by: list[str] = Field(default=[], description="stages that set `exit`")
    keep_asking: bool = Field(
        default=False, description="whether visual tokens that an answer is predicted from are kept after the exit"
    )
    encode: list[TracedEncode] = []
    boundaries: list[TracedBoundary] = []
    layers: list[TracedLayer]
    calls: list[TracedCall] = Field(min_length=1)
    answer: str


class TracedPrompt(_Part):
    """What the model was asked."""

    question: str
    tokens: Count = Field(description="logical tokens of the prompt")
    images: list[TracedImage]
    videos: list[Numbers] = Field(
        default=[], description="per video, its frames among the images, in the order of time; others are pictures"
    )
    pictures: list[str] = Field(default=[], description="SHA-256 of each picture's size and RGB bytes")


class Trace(_Part):
    """A trace file."""

    format: Literal["dropflow-trace/1"] = Field(default="dropflow-trace/1", description="version of this format")
    model: str = Field(description="`model_type` of the model's config")
    depth: Count = Field(gt=0, description="decoder layers")
    prompt: TracedPrompt
    runs: list[TracedRun] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Check that numbers are in range, dropped patches never come back, and protected ones are never dropped."""
        faults = prompt_faults(self) or [
            fault
            for n, run in enumerate(self.runs)
            for fault in bounds_faults(self, run, f"runs.{n}") or _faults(self, run, f"runs.{n}")
        ]
        if faults:
            raise ValueError("\n".join(faults[:_SHOWN_FAULTS]))
        return self

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a trace file; raises `InputError` naming its faults."""
        if not path.is_file():
            raise InputError(f"{path}: no such trace file; {_REMEDY}")
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValidationError) as error:
            raise InputError("\n".join(f"{path}: {line}" for line in _lines(error))) from None

    def save(self, path: Path) -> None:
        """Write the trace file, creating its folder."""
        write_text(path, self.model_dump_json() + "\n")

    def entering(self, run: TracedRun) -> list[list[int]]:
        """Per image: patches whose rows reach the LLM, in the prompt's numbers."""
        present = [list(range(len(image.index))) for image in self.prompt.images]
        for step in run.encode:
            if step.shift:
                present = [[*range(step.shift), *(p + step.shift for p in one.kept)] for one in step.images]
            else:
                present = [list(one.kept) for one in step.images]
        return present

    def protected(self, run: TracedRun) -> list[list[int]]:
        """Per image: patches that no stage of the LLM may drop, in the prompt's numbers."""
        if not run.encode:
            return [[] for _ in self.prompt.images]
        last = run.encode[-1]
        return [[p + last.shift for p in one.protected] for one in last.images]


def _faults(trace: Trace, run: TracedRun, path: str) -> list[str]:
    """Return the contradictions in a run whose numbers are within bounds."""
    faults = []
    before, since, protected = trace.entering(run), "the vision encoder", trace.protected(run)
    for n, boundary in enumerate(run.boundaries):
        where = f"{path}.boundaries.{n}.kept"
        for i, merges in enumerate(boundary.merged):
            absent = {merge.into for merge in merges}.difference(before[i])
            absent |= {p for merge in merges for p, image in merge.sources(i) if p not in before[image]}
            if absent:
                faults.append(
                    f"{path}.boundaries.{n}.merged.{i}: patch {min(absent)} was gone after {since}; leave it out"
                )
        for i, kept in enumerate(boundary.kept):
            gone = sorted(set(kept) - set(before[i]))
            lost = sorted(set(protected[i]) - set(kept))
            if gone:
                faults.append(f"{where}.{i}: patch {gone[0]} was gone after {since}; keep it there, too")
            if lost:
                faults.append(f"{where}.{i}: patch {lost[0]} is protected; keep it")
        if faults:
            break
        before, since = [list(kept) for kept in boundary.kept], f"boundary {boundary.boundary}"
    return faults


def _lines(error: UnicodeDecodeError | ValidationError) -> list[str]:
    if isinstance(error, UnicodeDecodeError):
        return [f"not a trace file: {error}; {_REMEDY}"]
    if error.errors()[0]["type"] == "json_invalid":
        return [f"not a trace file: {error.errors()[0]['msg']}; {_REMEDY}"]
    lines = []
    for fault in error.errors()[:_SHOWN_FAULTS]:
        where = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        lines += [shortened(f"{where}: {line}" if where else line) for line in message.splitlines()]
    return lines

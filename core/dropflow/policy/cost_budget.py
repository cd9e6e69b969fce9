"""What a policy may cost, and the knobs that are marked `solve` so that it costs that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dropflow.errors import PolicyError, escaped, listed
from dropflow.lifecycle.stage import StageOptions
from dropflow.policy.schedule import Schedule
from dropflow.units import LARGEST, BackboneShape, Depth, Scale, Tokens

SOLVE = "solve"
"""The value of a knob whose number follows from the budget."""
Path = tuple[Any, ...]
"""Path of a knob inside the options of its stage, such as `("keep", 10)`."""
Work = Callable[[float], float]
"""Multiply-adds of one decoder layer for a number of visual tokens."""
WHOLE = 1.0
"""What a marked knob holds until it is solved: all tokens, or the last boundary."""


class CostBudget(BaseModel):
    """What a policy may cost for one image, at most; exactly one of the three."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    average_tokens: int | float | None = Field(
        default=None,
        gt=0,
        le=LARGEST,
        description="visual tokens per layer, averaged over all layers; a float up to 1.0 is a share of the image's",
    )
    flops: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="multiply-adds of the visual tokens in the decoder (4 n d^2 + 2 n^2 d + 3 n d m per layer), as a "
        "share of those without a policy",
    )
    kv: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="visual entries in the KV cache after the prefill, as a share of those without a policy",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> CostBudget:
        if len(self.model_fields_set & _stated(self)) != 1:
            raise ValueError("expected exactly one of average_tokens, flops and kv")
        return self

    @property
    def kind(self) -> Literal["average_tokens", "flops", "kv"]:
        """The one that is stated."""
        (name,) = _stated(self)
        return name  # type: ignore[return-value]  # the names of the fields

    def average(self, visual_tokens: int) -> float:
        """The budget as visual tokens per layer of an image of this size; for FLOPs and KV, about that."""
        tokens = self.average_tokens
        if tokens is None:
            return float(getattr(self, self.kind)) * visual_tokens
        return tokens * visual_tokens if isinstance(tokens, float) and tokens <= 1 else tokens

    def limit(self, scale: Scale, visual_tokens: int) -> float:
        """The number that `spent` may not exceed; raises `PolicyError` for tokens that were tuned for other images."""
        if self.average_tokens is None:
            return float(getattr(self, self.kind))
        tokens, tuned = self.average_tokens, scale.tuned_for
        if isinstance(tokens, float) and tokens <= 1:
            return self.average(visual_tokens)
        if scale.target.visual_tokens is None or (tuned and tuned.visual_tokens != visual_tokens and not scale.rescale):
            images = "images of any size" if scale.target.visual_tokens is None else f"{visual_tokens} visual tokens"
            raise PolicyError(
                f"budget.average_tokens: the absolute number {tokens:g} does not suit a model with {images}; write a "
                "share (a float up to 1.0), or set `rescale: true` where only the number differs"
            )
        return tokens * visual_tokens / tuned.visual_tokens if tuned and tuned.visual_tokens else tokens

    def spent(self, schedule: Schedule, shape: BackboneShape, visual_tokens: int, work: Work | None) -> float | None:
        """What a policy of this schedule costs, to be compared with `limit`; `None` where the data decides."""
        counts = [count for count in schedule.per_layer if count is not None]
        if len(counts) < shape.layers:
            return None
        if self.kind == "average_tokens":
            return sum(counts) / shape.layers
        if self.kind == "kv":
            return sum(counts[layer] for layer in shape.holding) / (visual_tokens * len(shape.holding))
        if work is None:
            raise PolicyError(
                "budget.flops: needs the widths of the model; use `average_tokens` or `kv` where there is none"
            )
        return sum(map(work, counts)) / (shape.layers * work(visual_tokens))


def _stated(budget: CostBudget) -> set[str]:
    return {name for name in CostBudget.model_fields if getattr(budget, name) is not None}


def marks(options: Mapping[Any, Any]) -> list[Path]:
    """Paths of all values of a stage's options that are `solve`, in order."""
    found: list[Path] = []
    for key, value in options.items():
        if isinstance(value, Mapping):
            found += [(key, *path) for path in marks(value)]
        elif value == SOLVE:
            found.append((key,))
    return found


def kind_of(options: type[StageOptions], path: Sequence[Any]) -> Literal["tokens", "boundary"] | None:
    """Whether the option at `path` is a number of tokens or a boundary; `None` if it is neither."""
    hint = get_type_hints(options, include_extras=True).get(str(path[0]))
    for _ in path[1:]:
        hint = next((get_args(one)[1] for one in _members(hint) if get_origin(one) is dict), None)
    members = _members(hint)
    return "tokens" if Tokens in members else "boundary" if Depth in members else None


def _members(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def put(options: Mapping[Any, Any], path: Path, value: Any) -> dict[Any, Any]:
    """A copy of plain options with `value` at `path`."""
    first, *rest = path
    return {**options, first: put(options[first], tuple(rest), value) if rest else value}


def check_marks(name: str, options: type[StageOptions], found: Sequence[Path]) -> None:
    """Raise `PolicyError` for a marked option that cannot be solved."""
    faults = [
        f"stages.{escaped(name)}.{escaped('.'.join(map(str, path)))}: cannot be solved; `solve` stands for a number of "
        "tokens or a boundary"
        for path in found
        if kind_of(options, path) is None
    ]
    if faults:
        raise PolicyError(listed(faults))

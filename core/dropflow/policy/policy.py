"""What a policy is, once read: a name, the backbone it was tuned for, and named stages with validated options."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from dropflow.errors import LONGEST, PolicyError, UnknownName, escaped, listed, nearest, quoted
from dropflow.lifecycle.hooks import HOOKS, hook_faults
from dropflow.lifecycle.stage import LOCAL_MODELS, Stage, StageOptions
from dropflow.policy import registry
from dropflow.policy.bounds import Name, bounded
from dropflow.policy.cost_budget import SOLVE, WHOLE, CostBudget, Path, check_marks, kind_of, marks, put
from dropflow.policy.expected import expected
from dropflow.units import LARGEST


class TunedFor(BaseModel):
    """The backbone shape that a policy's absolute numbers were chosen for."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: int = Field(gt=0, le=LARGEST, description="decoder layers")
    visual_tokens: int = Field(gt=0, le=LARGEST, description="visual tokens of one image at entry to the LLM")


@dataclass(frozen=True)
class StageUse:
    """One named stage of a policy: which stage, and its validated options."""

    use: str
    stage: type[Stage[Any]]
    options: StageOptions
    solve: tuple[Path, ...] = ()
    """Options marked `solve`, by path; until they are solved for a backbone, `options` holds 1.0 there."""

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data, as in a policy file."""
        options: dict[str, Any] = self.options.model_dump(exclude_none=True)
        for path in self.solve:
            options = put(options, path, SOLVE)
        return {"use": self.use, **options}


@dataclass(frozen=True)
class Policy:
    """An ordered composition of stages, every option validated; make one with `load_policy`."""

    name: str
    """Name used in reports and file names: up to 100 letters, digits, `.`, `_` and `-`."""
    stages: dict[str, StageUse]
    """Name of each stage in this policy -> the stage and its options, in the order they are asked."""
    description: str = ""
    """What it is for, in a sentence."""
    tuned_for: TunedFor | None = None
    """The backbone that its absolute numbers are for; `None` where it has none."""
    rescale: bool = False
    """Whether absolute numbers are scaled to other backbones instead of refused."""
    positions: Literal["persistent", "compact"] = "persistent"
    """Whether survivors keep their position ids, or these are renumbered after every drop."""
    recall: bool = False
    """Whether a later question of a conversation chooses anew among all visual tokens."""
    budget: CostBudget | None = None
    """What it may cost, where knobs are marked `solve`; resolving it for a backbone solves them."""

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain data, with the keys of a YAML policy file."""
        head = {
            "name": self.name,
            "description": self.description,
            "rescale": self.rescale,
            "positions": self.positions,
        }
        tuned = {"tuned_for": self.tuned_for.model_dump()} if self.tuned_for else {}
        recall = {"recall": True} if self.recall else {}
        budget = {"budget": self.budget.model_dump(exclude_none=True)} if self.budget else {}
        return head | recall | tuned | budget | {"stages": {name: use.to_dict() for name, use in self.stages.items()}}


class _Head(BaseModel):
    """The top level of a policy file; the options of its stages are validated separately."""

    model_config = ConfigDict(extra="forbid")
    name: Name = Field(description="name of the policy: up to 100 letters, digits, `.`, `_` and `-`")
    description: str = Field(default="", description="what it is, in a sentence")
    tuned_for: TunedFor | None = Field(default=None, description="the backbone the absolute numbers belong to")
    rescale: bool = Field(default=False, description="scale absolute numbers to a backbone of another shape")
    positions: Literal["persistent", "compact"] = Field(
        default="persistent",
        description="position ids of survivors: `persistent` keeps the original ones, `compact` renumbers them without "
        "gaps after every drop, and puts a generated token at the length of each layer's cache",
    )
    recall: bool = Field(
        default=False,
        description="let a later question of a conversation choose anew among all visual tokens, which stay parked "
        "with their states before the first boundary at which a stage prunes",
    )
    budget: CostBudget | None = Field(
        default=None, description="what it may cost, from which the numbers written as `solve` follow on each backbone"
    )
    stages: dict[Name, dict[str, Any] | None] = Field(description="the stages, by name, in the order they are asked")


def policy_from_dict(data: Mapping[str, Any], *, local_models: bool = False) -> Policy:
    """Validate plain data against the policy model and the options of the stages it uses.

    A stage set to null is left out. With `local_models`, options that name a model accept only local folders. Raises
    `PolicyError` listing every fault with its path, what was expected and the nearest valid name. `use` is a registered
    name, or (from Python) a `Stage` subclass.
    """
    faults: list[str] = []
    head: _Head | None = None
    try:
        head = _Head.model_validate(dict(data))
    except ValidationError as error:
        faults += _faults(error, "", _Head)
    stages: dict[str, StageUse] = {}
    solving = data.get("budget") is not None
    given = data.get("stages")
    entries: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    for name, entry in entries.items():
        if isinstance(entry, Mapping):
            try:
                if "use" not in entry:
                    raise PolicyError(f"stages.{escaped(name)}.use: missing; {_which_stage(name, entries)}")
                stages[name] = _stage_use(name, entry, local_models, solving=solving)
            except PolicyError as error:
                faults += str(error).split("\n")
    if not faults and solving and not any(use.solve for use in stages.values()):
        faults.append("budget: no number is written as `solve`, so nothing follows from it; mark one, or leave it out")
    if faults or head is None:
        raise PolicyError(listed(faults))
    own = head.model_dump(exclude={"stages", "tuned_for", "budget"})
    return Policy(**own, tuned_for=head.tuned_for, budget=head.budget, stages=stages)


def _never_asked(stage: type[Stage[Any]]) -> list[str]:
    """A `prune` that names no boundary would silently do nothing."""
    if not hasattr(stage, "prune") or stage.forecast is not Stage.forecast or stage.prune_at is not Stage.prune_at:
        return []
    return ["defines prune, but at no boundary; name its boundaries in `Forecast.keeps` or in `prune_at`"]


def _hookless(stage: type[Stage[Any]]) -> list[str]:
    """A stage without a hook would silently do nothing, too."""
    return [] if any(hasattr(stage, hook) for hook in HOOKS) else [f"has no hook; define one: {', '.join(HOOKS)}"]


def _stage_use(name: str, entry: Mapping[str, Any], local_models: bool, *, solving: bool) -> StageUse:
    path = f"stages.{escaped(name)}"
    options = {key: value for key, value in entry.items() if key != "use"}
    use = entry["use"]
    if isinstance(use, type):
        if not issubclass(use, Stage):
            what = "expected the name of a stage or a subclass of `dropflow.Stage`"
            raise PolicyError(f"{path}.use: {what}, got {quoted(use)}")
        stage, use = use, use.__qualname__
    else:
        try:
            stage = registry.load(registry.STAGES, str(use))
        except UnknownName:
            raise PolicyError(
                f"{path}.use: no stage named {quoted(use)}; {nearest(str(use), registry.names(registry.STAGES))}"
            ) from None
    wrong = hook_faults(stage)  # type: ignore[arg-type]  # mypy does not take a class for hashable
    faults = [f"{path}: {fault}" for fault in (*wrong, *_never_asked(stage)) or _hookless(stage)]
    if faults:
        raise PolicyError(listed(faults))
    context = {LOCAL_MODELS: local_models}
    marked = marks(options)
    if solving:
        check_marks(name, stage.Options, marked)
        for mark in marked:
            options = put(options, mark, WHOLE)
    try:
        found = stage.Options.model_validate(_without_nulls(options), context=context)
    except ValidationError as error:
        missing = ["budget: missing; `solve` needs one, such as `budget: {average_tokens: 64}`"]
        unsolved = not solving and any(kind_of(stage.Options, mark) for mark in marked)
        raise PolicyError(listed(_faults(error, path, stage.Options) + missing * unsolved)) from None
    bounded(found.model_dump(), path, ("stages", name))  # a number may have been written as text
    return StageUse(use=use, stage=stage, options=found, solve=tuple(marked) if solving else ())


def _which_stage(name: str, entries: Mapping[str, Any]) -> str:
    """The remedy for an entry without `use`, whose name may be a misspelling of another stage's."""
    others = [other for other, entry in entries.items() if isinstance(entry, Mapping) and "use" in entry]
    which = "say which stage it uses (`dropflow list stages` has all)"
    return f"{which}, or name a stage of this policy: {nearest(name, others)}" if others else which


def _without_nulls(value: Any) -> Any:
    """Drop null entries of mappings: in a policy that extends another, null removes an inherited entry."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _faults(error: ValidationError, path: str, model: type[BaseModel]) -> list[str]:
    """One line per distinct path of a pydantic error: path, expected and actual value, nearest valid name."""
    lines: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False):
        unknown = fault["type"] == "extra_forbidden"  # then the last part is a key, even if it looks like a marker
        # unions and [key] markers add parts to `loc` that are not in the file
        inner = fault["loc"][-1:] if unknown else ()
        outer = [part for part in fault["loc"][: len(fault["loc"]) - len(inner)] if not _is_marker(part)]
        parts = [escaped(part) for part in (*outer, *inner)]
        where = ".".join([path, *parts]).strip(".")
        message = escaped(fault["msg"].removeprefix("Value error, "), 2 * LONGEST)
        message = message[0].lower() + message[1:]
        if unknown:
            message = f"unknown option; {nearest(parts[-1], model.model_fields)}"
        elif fault["type"] == "missing":
            shape = expected(model, parts)
            message += f", {shape}" if shape.startswith("a ") else ""
        elif fault["type"] in {"dict_type", "model_type", "tuple_type", "list_type"}:
            message = f"expected {expected(model, parts) or 'a mapping'}, got {quoted(fault['input'])}"
        else:
            message += f", got {quoted(fault['input'])}"
        lines.setdefault(where or "policy", []).append(message)
    return [f"{where}: {' or '.join(dict.fromkeys(messages))}" for where, messages in lines.items()]


def _is_marker(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in {"int", "float"})


def _use_model(name: str, stage: type[Stage[Any]]) -> Any:
    use: Any = (Literal[name], Field(description=stage.summary))
    return create_model(name.title().replace("/", "").replace("-", ""), __base__=stage.Options, use=use)


def schema() -> dict[str, Any]:
    """JSON Schema (Draft 2020-12) of a policy file, with the options of every registered stage."""
    uses = [_use_model(name, registry.load(registry.STAGES, name)) for name in registry.names(registry.STAGES)]
    union: Any = functools.reduce(operator.or_, uses)
    one: Any = Annotated[union, Field(discriminator="use")] if len(uses) > 1 else union
    stages: Any = dict[Name, Union[one, None]]  # noqa: UP007  # made at run time
    model = create_model(
        "PolicyFile",
        __base__=_Head,
        name=(Name | None, Field(default=None, description="name of the policy; the file's name if left out")),
        extends=(str | None, Field(default=None, description="name or path of a policy to inherit from")),
        stages=(stages, Field(description=_Head.model_fields["stages"].description)),
    )
    whole = TypeAdapter(model).json_schema()
    shared = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": whole.pop("$defs", {})}
    # a file that inherits may have only some options of a stage, or no stages at all
    part = whole | {"properties": whole["properties"] | {"stages": {"type": "object"}}, "required": []}
    return shared | {"if": {"required": ["extends"]}, "then": part, "else": whole}

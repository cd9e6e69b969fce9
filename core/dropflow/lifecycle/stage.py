"""What a stage is: options, the boundaries it names, a forecast that needs no weights, and lifecycle hooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from dropflow.errors import PolicyError
from dropflow.units import Budget, Rounding, Scale

if TYPE_CHECKING:
    from torch import nn

    from dropflow.backbone.backbone import Backbone

EncodeBoundary = int | float | Literal["pixels", "features"] | None
"""A place on the vision side: `pixels`, before the vision tower; `i`, before layer `i` of the encoder; `i + 0.5`,
inside layer `i` between its attention and its feed-forward part; `features`, after all layers, on what the projector
gets; `None`, after the projector."""


class StageOptions(BaseModel):
    """Base of every stage's options: unknown keys are errors, values are frozen, defaults are validated.

    Numbers are finite; a policy's are at most 2,147,483,647.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


LOCAL_MODELS = "local_models"
"""Key of the validation context, true where models may be read only from local folders."""


def _local_where_asked(source: str, info: ValidationInfo) -> str:
    if (info.context or {}).get(LOCAL_MODELS) and not os.path.isdir(source):
        raise ValueError(
            "expected a local folder, since the policy came with a model; `allow_downloads=True` lets it name a model "
            "to download"
        )
    return source


ModelSource = Annotated[str, Field(min_length=1), AfterValidator(_local_where_asked)]
"""Folder or hub name of a model that a stage loads besides the backbone. A policy that a checkpoint records may only
name a local folder, unless the caller allows downloads."""


@dataclass(frozen=True)
class Window:
    """The layers in which vision takes part: `entry <= layer < exit`."""

    entry: int
    """Boundary from which vision is live."""
    exit: int
    """Boundary from which no vision is live."""


@dataclass(frozen=True)
class Forecast:
    """What a stage will do, as far as its options alone determine it; `None` where the data decides."""

    entry: int | None = None
    """Boundary from which vision is live (an `inject` stage)."""
    exit: int | None = None
    """Boundary from which no vision is live (an `exit` stage)."""
    encoded: Budget | Literal["data"] | None = None
    """Visual tokens of one image that an `encode` stage leaves; `data` where each image differs.

    A share is relative to the rows that the stage finds.
    """
    by_grid: Callable[[tuple[int, int]], int] | None = None
    """For `data` that is no more than the patch grid: the rows that are left of a whole grid of (rows, columns)."""
    protected: Budget | None = None
    """Rows that no later stage may drop, of those that an `encode` stage finds."""
    keeps: Mapping[int, Budget | None] = field(default_factory=dict)
    """Visual tokens of one image left after each boundary (a `prune` stage)."""


@dataclass(frozen=True)
class StageContext:
    """What a stage receives when a policy is resolved for a backbone."""

    name: str
    """The stage's name in the policy, such as `pyramid`."""
    scale: Scale
    """Converts `Depth` and `Tokens` options to boundaries and budgets of this backbone."""
    window: Window
    """Where vision enters and exits; a stage that sets it itself is given the whole depth."""
    positions: Literal["persistent", "compact"] = "persistent"
    """Position ids of survivors under the policy: the original ones, or renumbered without gaps."""
    facts: frozenset[str] | None = None
    """What the backbone states, keys of `dropflow.FACTS`; `None` where no model is known, as in `dropflow explain`."""

    def path(self, option: str) -> str:
        """Path of one of this stage's options in the policy file, for error messages."""
        return f"stages.{self.name}.{option}"

    def provides(self, fact: str) -> bool:
        """Whether the backbone states a fact; true where no model is known, so that the published place is shown."""
        return self.facts is None or fact in self.facts

    def features_place(self, at: Literal["features", "output"] | None) -> EncodeBoundary:
        """Place of an `encode` stage on what the projector gets (`features`) or on what it gives (`output`).

        Where its option `at` is left out, it is the first of them that the backbone has.
        """
        found = at or ("features" if self.provides("projector") else "output")
        return None if found == "output" else found

    def boundaries(self, option: str, depths: Iterable[int | float]) -> tuple[int, ...]:
        """An option that lists boundaries, ascending; raises `PolicyError` as `budgets` does."""
        return tuple(sorted(self._distinct((self.path(option), depth) for depth in depths)))

    def budgets(
        self, option: str, values: Mapping[int | float, int | float], rounding: Rounding = "half_up"
    ) -> dict[int, Budget]:
        """An option `{boundary: tokens}` as budgets by boundary, ascending.

        Raises `PolicyError` where a number does not fit the backbone, or two of them mean the same boundary.
        """
        found = self._distinct((self.path(f"{option}.{depth}"), depth) for depth in values)
        return {
            boundary: self.scale.tokens(values[depth], self.path(f"{option}.{depth}"), rounding)
            for boundary, depth in sorted(found.items())
        }

    def _distinct(self, depths: Iterable[tuple[str, int | float]]) -> dict[int, int | float]:
        found: dict[int, int | float] = {}
        for path, depth in depths:
            boundary = self.scale.boundary(depth, path)
            if boundary in found:
                layers = self.scale.target.layers
                raise PolicyError(f"{path}: boundary {boundary} is named twice on a model of {layers} layers")
            found[boundary] = depth
        return found

    def check_layer_before(self, option: str, boundaries: Iterable[int]) -> None:
        """Check that vision takes part in the layers before and after each boundary.

        For stages that rank by the layer before a boundary. Raises `PolicyError` otherwise.
        """
        entry, end = self.window.entry, self.window.exit
        for boundary in boundaries:
            if not entry < boundary < end:
                raise PolicyError(
                    f"{self.path(option)}: boundary {boundary} is ranked by the attention of layer {boundary - 1}, but "
                    f"vision takes part in layers {entry} to {end - 1}; expected a boundary from {entry + 1} to "
                    f"{end - 1}"
                )


O_co = TypeVar("O_co", bound=StageOptions, covariant=True)


class Stage(Generic[O_co]):
    """One step of a method: subclass it, set `Options`, and implement lifecycle hooks marked with `hookimpl`.

    A stage holds no state between calls. Hooks receive one frozen payload and return a decision or `None`;
    the engine applies it. Properties below are read once, when the policy is attached.
    """

    Options: ClassVar[type[StageOptions]] = StageOptions
    """Pydantic model of the options a policy may set."""
    summary: ClassVar[str] = ""
    """One line for `dropflow list stages`."""
    paper: ClassVar[str] = ""
    """Where the method is published, such as `arXiv:2602.23699`."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Options that suit any backbone, with shares for numbers; the conformance kit runs the stage with them."""
    needs: frozenset[str] = frozenset()
    """Backbone facts it cannot do without, such as `cls` or `grid`: keys of `dropflow.FACTS`.

    A stage that makes do with less under some options may set it on itself."""
    training_free: ClassVar[bool] = True
    """False where the published method trains the model with this stage; untrained, it runs with less accuracy."""
    published_as: ClassVar[tuple[str, ...]] = ()
    """Prefixes under which published checkpoints hold the weights of its module, such as `visual.scorer.`."""
    needs_training: ClassVar[bool] = False
    """Whether a fresh module decides nothing sensible: it is then attached only to a model that is in `train()`."""
    float32: ClassVar[bool] = False
    """Whether its module stays in float32 on a model of lower precision; otherwise it gets the model's dtype."""

    def __init__(self, options: O_co, context: StageContext) -> None:
        self.options = options
        self.context = context

    @property
    def prune_at(self) -> tuple[int, ...]:
        """LLM boundaries at which `prune` is asked: those of the forecast, unless a stage says otherwise."""
        return tuple(self.forecast().keeps)

    @property
    def encode_at(self) -> tuple[EncodeBoundary, ...]:
        """Where `encode` is asked; `None`, the encoder's output before the LLM, unless a stage says otherwise."""
        return (None,)

    @property
    def taps(self) -> tuple[int, ...]:
        """Decoder layers whose own attention rows `prune` reads *after* they ran (layer < boundary)."""
        return ()

    @property
    def reads_states(self) -> bool:
        """Whether `prune` reads values and states of the layers in `taps`, which are kept only where it does."""
        return False

    @property
    def ranks(self) -> bool:
        """Whether `prune` reads attention rows of the layer after its boundary (`attention_rows(call.boundary, ...)`).

        Where that layer has no attention, the engine keeps q and k of the last one before it that has. By default true
        for stages without `taps`.
        """
        return not self.taps

    @property
    def differentiable(self) -> bool:
        """Whether `prune` wants gradients while the model trains: of its attention rows, and through `Keep.weights`."""
        return False

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """Vision encoder layers whose attention rows `encode` reads; negative ones count from its end."""
        return ()

    @property
    def decode_taps(self) -> tuple[int, ...]:
        """Decoder layers whose attention rows `decode_cache` reads while decoding, but not after the prefill."""
        return ()

    @property
    def decode_reads_at(self) -> tuple[int, ...]:
        """Decoder layers at which `decode_cache` chooses, in every decode step, which entries the step reads.

        A stage that lists some gets a `StepCall` there, and is not asked after the prefill or the step.
        """
        return ()

    @property
    def carries(self) -> int:
        """Numbers per patch that `encode` hands to `prune` of the same stage (`Encode.carry`, `PruneCall.carried`)."""
        return 0

    @property
    def reads_questions(self) -> bool:
        """Whether `prune` reads the questions as text, which callers then state (see `dropflow.questions`)."""
        return False

    @property
    def reads_videos(self) -> bool:
        """Whether the stage needs to know which images are frames of which video.

        See `EncodeCall.videos` and `PruneCall.video_id`. Callers state it where a processor hands over pictures and
        frames alike (see `dropflow.videos`); a call without is refused.
        """
        return False

    @property
    def follows_progress(self) -> bool:
        """Whether training depends on how far it has come (`progress` of a payload), which callers then state."""
        return False

    @property
    def decode_every(self) -> int:
        """Generated tokens after which `decode_cache` is asked again; with 0 it is asked only after prefill."""
        return 0

    def prepare(self, backbone: Backbone) -> None:
        """Called once when the policy is attached, before everything else, to load what the stage needs.

        Raises `PolicyError` naming the option (see `StageContext.path`) that does not fit `backbone`.
        """

    def build_module(self, backbone: Backbone) -> nn.Module | None:  # noqa: ARG002
        """The module that this stage trains, freshly initialised; `None` for most stages.

        Called when the policy is attached, after `prepare`, with torch's generator seeded, so that every process builds
        the same. The engine registers it on the model, where optimizers and parallel wrappers find it, hands it to the
        hooks in their payload (`module`), saves it beside the policy and loads it by name. Parameters are float32 on
        the CPU. Policies of one set whose stages have the same name and build the same share one module.
        """
        return None

    def learned(self, module: nn.Module) -> Mapping[str, Any] | None:  # noqa: ARG002
        """Options with which this stage does without `module` what it has learned; `None` where it cannot.

        Given over the options of the policy; an option set to `None` is left out.
        """
        return None

    def forecast(self) -> Forecast:
        """What this stage will do, from its options alone; used by checks and by `dropflow explain`."""
        return Forecast()

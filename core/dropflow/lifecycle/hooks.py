"""The lifecycle: hook specifications for pluggy, and a typed facade that asks stages in policy order."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import pluggy

from dropflow.errors import DecisionError, nearest

if TYPE_CHECKING:
    from dropflow.lifecycle.cache_payloads import CacheCall, CacheKeep, CacheSelect, StepCall
    from dropflow.lifecycle.events import BoundaryEvent, CacheEvent, EncodeEvent
    from dropflow.lifecycle.payloads import Encode, EncodeCall, Exit, Keep, PruneCall, WindowCall
    from dropflow.lifecycle.stage import Stage

PROJECT = "dropflow"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Lifecycle:
    """The hooks a stage may implement; each gets one frozen payload and returns a decision or `None`."""

    @hookspec
    def encode(self, call: EncodeCall) -> Encode | None:
        """Keep, merge or protect the tokens of each image, before or inside the vision encoder or on its output."""

    @hookspec
    def inject(self, call: WindowCall) -> int | None:
        """Return the boundary (0..L) from which vision is live; asked once per prefill."""

    @hookspec
    def prune(self, call: PruneCall) -> Keep | None:
        """Return which live tokens stay, at a boundary the stage names in `prune_at`."""

    @hookspec
    def exit(self, call: WindowCall) -> int | Exit | None:
        """Return the boundary (0..L) from which no vision is live; asked once per prefill."""

    @hookspec
    def decode_cache(self, call: CacheCall | StepCall) -> CacheKeep | CacheSelect | None:
        """Return the cache entries to keep per layer, after prefill and at decode steps the stage asks for.

        A stage with `decode_reads_at` gets a `StepCall` instead, at these layers of each decode step, and returns which
        entries the step reads.
        """

    @hookspec
    def observe_encode(self, event: EncodeEvent) -> None:
        """Watch what became of the images of one call of the vision encoder; an observer can change nothing."""

    @hookspec
    def observe(self, event: BoundaryEvent) -> None:
        """Watch what was applied at a boundary; an observer can change nothing."""

    @hookspec
    def observe_cache(self, event: CacheEvent) -> None:
        """Watch what the caches hold after the prefill or a decode step; an observer can change nothing."""


HOOKS = tuple(name for name in vars(Lifecycle) if not name.startswith("_"))


@lru_cache(maxsize=256)  # the same few classes, whenever a policy is read
def hook_faults(kind: type[Stage[Any]]) -> tuple[str, ...]:
    """Why methods of a stage cannot be called as hooks: a missing or misplaced marker, or a wrong signature."""
    faults = []
    for name, method in inspect.getmembers_static(kind, inspect.isroutine):
        marked = hasattr(method, f"{PROJECT}_impl")
        if name in HOOKS and not marked:
            faults.append(f"defines {name}, but it is not marked with hookimpl; write @hookimpl above it")
        elif marked and name not in HOOKS:
            faults.append(f"marks {name} with hookimpl, but no hook has this name; {nearest(name, HOOKS)}")
        elif marked and not _required(method) <= _required(getattr(Lifecycle, name)):
            expected = inspect.signature(getattr(Lifecycle, name))
            faults.append(f"defines {name}{inspect.signature(method)}, expected {name}{expected}".replace("'", ""))
    return tuple(faults)


def _required(method: Any) -> set[str]:
    """Names of the parameters after `self` that have no default: pluggy finds arguments by name."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return {one.name for one in parameters if one.default is one.empty}


class _Manager(pluggy.PluginManager):
    """A manager that inspects only what is named like a hook, and not the hundred other attributes of a stage."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name in HOOKS else None

    def parse_hookspec_opts(self, module_or_class: Any, name: str) -> Any:
        return super().parse_hookspec_opts(module_or_class, name) if name in HOOKS else None


class Hooks:
    """Asks the stages of one policy, in policy order (pluggy alone would call the last registered first)."""

    def __init__(self, stages: Sequence[tuple[str, Stage[Any]]]) -> None:
        """Register `stages`, whose classes must have no `hook_faults`."""
        manager = _Manager(PROJECT)
        manager.add_hookspecs(Lifecycle)
        for name, stage in stages:
            manager.register(stage, name)
        manager.check_pending()
        self._callers: dict[str, list[tuple[str, Stage[Any], Any]]] = {hook: [] for hook in HOOKS}
        for hook in HOOKS:
            for name, stage in stages:
                others = [other for _, other in stages if other is not stage]
                caller = manager.subset_hook_caller(hook, remove_plugins=others)
                if caller.get_hookimpls():
                    self._callers[hook].append((name, stage, caller))

    def implementers(self, hook: str) -> list[tuple[str, Stage[Any]]]:
        """Stages that implement `hook`, in policy order, with their names in the policy."""
        return [(name, stage) for name, stage, _ in self._callers[hook]]

    def watched(self, hook: str) -> bool:
        """Whether any stage implements `hook`."""
        return bool(self._callers[hook])

    def encode(self, call: EncodeCall, stage: Stage[Any]) -> Encode | None:
        """The answer of one stage at one boundary of the vision encoder, or on its output."""
        return cast("Encode | None", next((answer for _, answer in self._ask("encode", stage, call=call)), None))

    def inject(self, call: WindowCall) -> Iterator[tuple[str, int]]:
        """Boundaries from which vision is live, as answered in policy order."""
        return cast("Iterator[tuple[str, int]]", self._ask("inject", None, call=call))

    def prune(self, call: PruneCall, stage: Stage[Any]) -> Keep | None:
        """The answer of one stage at one boundary."""
        return cast("Keep | None", next((answer for _, answer in self._ask("prune", stage, call=call)), None))

    def exit(self, call: WindowCall) -> Iterator[tuple[str, int | Exit]]:
        """Boundaries from which no vision is live, as answered in policy order."""
        return cast("Iterator[tuple[str, int | Exit]]", self._ask("exit", None, call=call))

    def decode_cache(self, call: CacheCall | StepCall, stage: Stage[Any]) -> CacheKeep | CacheSelect | None:
        """The answer of one stage about the cache."""
        answer = next((a for _, a in self._ask("decode_cache", stage, call=call)), None)
        return cast("CacheKeep | CacheSelect | None", answer)

    def observe_encode(self, event: EncodeEvent) -> None:
        """Notify every observer of the vision encoder; as below, what it returns is ignored."""
        self._tell("observe_encode", event)

    def observe(self, event: BoundaryEvent) -> None:
        """Notify every observer of boundaries."""
        self._tell("observe", event)

    def observe_cache(self, event: CacheEvent) -> None:
        """Notify every observer of caches."""
        self._tell("observe_cache", event)

    def _tell(self, hook: str, event: object) -> None:
        for _ in self._ask(hook, None, event=event):
            pass

    def _ask(self, hook: str, only: Stage[Any] | None, **payload: Any) -> Iterator[tuple[str, Any]]:
        for name, stage, caller in self._callers[hook]:
            if only is None or only is stage:
                try:
                    yield from [(name, _checked(hook, answer)) for answer in caller(**payload)]
                except DecisionError as error:
                    raise DecisionError(f"stages.{name}: {str(error).removeprefix(f'stages.{name}: ')}") from error


@lru_cache(maxsize=len(HOOKS))
def _decisions(hook: str) -> tuple[type, ...]:
    """The types of decision that a hook may answer with; none for an observer, whose answers are ignored."""
    from dropflow.lifecycle.cache_payloads import CacheKeep, CacheSelect
    from dropflow.lifecycle.payloads import Encode, Exit, Keep

    known: dict[str, tuple[type, ...]] = {
        "encode": (Encode,),
        "inject": (int,),
        "prune": (Keep,),
        "exit": (int, Exit),
        "decode_cache": (CacheKeep, CacheSelect),
    }
    return known.get(hook, ())


def _checked(hook: str, answer: object) -> object:
    """A hook's answer, a boundary as an `int`; raises `DecisionError` for anything but the decisions it may return."""
    kinds = _decisions(hook)
    if not kinds or isinstance(answer, tuple(kind for kind in kinds if kind is not int)):
        return answer
    if int in kinds and not isinstance(answer, bool):
        with suppress(TypeError):
            return index(cast("SupportsIndex", answer))
    expected = ", ".join("a whole number" if kind is int else f"`{kind.__name__}`" for kind in kinds)
    raise DecisionError(f"`{hook}` answered {type(answer).__name__}, expected {expected} or `None`")

"""Attaching policies to a model, and detaching them."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, Literal

from torch import nn

from dropflow.backbone.backbone import Backbone, backbone_for
from dropflow.backbone.compiling import leave_uncompiled
from dropflow.backbone.flops import vision_only
from dropflow.backbone.versions import warn_if_untested
from dropflow.backbone.wrapped import check_compiled, check_is_model, unwrapped
from dropflow.engine.attach import refusals
from dropflow.engine.attach.flow import Flow, FlowSet
from dropflow.engine.attach.labelled_logits import check_loss_function
from dropflow.engine.attach.model_hooks import ModelHooks
from dropflow.engine.attach.overlap import check_overlap
from dropflow.engine.attach.stage_modules import StageModules
from dropflow.engine.attach.stage_weights import find_weights, knows_any, load_weights
from dropflow.engine.model.tap import sweep
from dropflow.engine.model.turns import Turns
from dropflow.engine.vision.encoding import attached_plans
from dropflow.errors import PolicyError, UnsupportedCall, UnsupportedModel, quoted
from dropflow.policy.plan import Plan, resolve
from dropflow.policy.policy import Policy
from dropflow.policy.policy_file import Source, load_policy
from dropflow.policy.recorded import WEIGHTS, Recording, recorded_policy

_log = logging.getLogger("dropflow")


class _Attachment:
    """The turns on one core and what is attached to it, held weakly because the hooks hold the model."""

    def __init__(self) -> None:
        self.turns = Turns()
        self._hooks: weakref.ref[ModelHooks] | None = None
        self.recording: Recording | None = None
        """The policy in the model's config; kept here because the hooks of an interrupted attach may be gone."""
        self.serials: frozenset[int] = frozenset()
        """`Plan.serial` of every attached policy."""

    @property
    def hooks(self) -> ModelHooks | None:
        """Hooks on the model, including those left by an interrupted attach or detach."""
        return None if self._hooks is None else self._hooks()

    @hooks.setter
    def hooks(self, hooks: ModelHooks | None) -> None:
        self._hooks = None if hooks is None else weakref.ref(hooks)

    @property
    def running(self) -> bool:
        """Whether this thread is inside a call of the model, or encodes beside one."""
        hooks = self.hooks
        beside = None if hooks is None else hooks.beside
        return self.turns.mine() is not None or (beside is not None and beside.mine() is not None)


_attachments: weakref.WeakKeyDictionary[Any, _Attachment] = weakref.WeakKeyDictionary()
"""Attachments by core and by the model around it."""


def attach(
    model: Any,
    policy: Source | None = None,
    *,
    overrides: Sequence[str] = (),
    adapter: str | type[Backbone] | None = None,
    allow_downloads: bool = False,
    logits: Literal["all", "labelled"] = "all",
    weights: str | PathLike[str] | None = None,
    overlap: bool = False,
) -> Flow:
    """Apply `policy` to every forward of `model` until the flow is detached or its `with` block ends.

    `policy` is a name, a path, a mapping or a `Policy`; without one, the policy recorded in the model's config is used.
    `overrides` are `path=value` strings. `adapter` selects a backbone adapter where the model's `model_type` does not.
    The only changes to the model are a few removable hooks and `config.dropflow`, which holds the policy while it is
    attached: a model saved in the meantime, for example by a trainer, records it (see `Flow.record`).

    A recorded policy comes from whoever saved the model, so options in it that name a model to load accept only local
    folders, unless `allow_downloads` is set. A policy that you pass is not restricted.

    With `logits="labelled"`, a forward with labels in `train()` runs the LM head and the loss only on positions that
    predict a label, and its `logits` are (1, rows, vocabulary): faster and smaller, for trainers that read the loss
    alone. The model's own forward computes the loss in either case.

    With `overlap`, images are encoded beside the layers before vision enters, in a thread (on a CUDA device on a stream
    of its own), with the same result bit for bit; for policies with late injection. See docs/overlap.md for the calls
    that encode first as ever, and `report.overlap` for how a call did.

    Modules that stages train are registered on the model as `dropflow_stages`, with fresh weights, or with those in
    `weights`: a safetensors file, or a folder with one. By default they are read from the folder that the model was
    loaded from, if it has some for these stages. `model.save_pretrained` writes them to a file of their own.

    Raises `PolicyError` for a policy that does not fit the model, or whose recorded weights are missing, and
    `UnsupportedModel` for a model that cannot be served (or has a flow attached already).
    """
    if logits not in ("all", "labelled"):
        raise ValueError(f"logits: expected 'all' or 'labelled', got {logits!r}")
    _check_flags(allow_downloads=allow_downloads, overlap=overlap)
    found = backbone_for(model, adapter)
    if logits == "labelled":
        check_loss_function(found.model)
    source = recorded_policy(found.model.config, allow_downloads=allow_downloads) if policy is None else policy
    plan = _resolved(found, load_policy(source, overrides))
    if overlap:
        check_overlap(found, [plan])
    own = _Weights(weights, recorded=policy is None, given=model)
    hooks = _attach(found, {"": plan}, "", own, labelled_only=logits == "labelled", overlap=overlap)
    flow = hooks.flows[""]
    assert flow is not None
    hooks.handle = flow
    return flow


def attach_set(
    model: Any,
    policies: Mapping[str, Source | None],
    *,
    default: str,
    adapter: str | type[Backbone] | None = None,
    weights: str | PathLike[str] | None = None,
    overlap: bool = False,
) -> FlowSet:
    """Attach several named policies to one model; each call chooses one of them with `FlowSet.using`.

    `None` runs the model without a policy. `default` names the policy that is used where a caller chooses none; it is
    also the one that the model's config records. Stages of the same name in several policies share the module that
    they train. With `overlap`, calls under a policy with late injection encode images beside the layers before vision
    enters, and those under the others before them, as ever. Everything else is as for `attach`; `PolicyError` is raised
    for `overlap` where no policy of the set has late injection.
    """
    if not policies or not isinstance(policies, Mapping) or not all(isinstance(name, str) for name in policies):
        raise PolicyError(
            f"attach_set: expected a mapping of names to policies, got {quoted(policies)}; give each policy a name"
        )
    if not isinstance(default, str) or default not in policies:
        raise PolicyError(
            f"attach_set: the default {quoted(default)} is not among the policies; name one of {', '.join(policies)}"
        )
    _check_flags(overlap=overlap)
    found = backbone_for(model, adapter)
    plans = {
        name: None if source is None else _resolved(found, load_policy(source)) for name, source in policies.items()
    }
    if overlap:
        check_overlap(found, plans.values())
    hooks = _attach(found, plans, default, _Weights(weights, recorded=False, given=model), overlap=overlap)
    hooks.handle = flows = FlowSet(hooks.flows, hooks, lambda: _detach(found.core))
    return flows


def _check_flags(**flags: Any) -> None:
    """Refuse what is neither true nor false, such as the text 'no', which Python takes for true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {quoted(value)}")


def detach(model: Any) -> None:
    """Detach every policy from the model, even if the flow object is lost; does nothing if none is attached.

    Waits for a forward that is running in another thread. Raises `UnsupportedCall` inside a forward of the same model.
    """
    if _attachment_of(model) is not None:
        _detach(unwrapped(model))


def flow_of(model: Any) -> Flow | FlowSet | None:
    """The flow or flow set that is attached to the model; `None` if there is none."""
    attachment = _attachment_of(model)
    hooks = None if attachment is None else attachment.hooks
    return hooks.handle if hooks is not None and hooks.flows else None


def _attachment_of(model: Any) -> _Attachment | None:
    inner = unwrapped(model)
    found = _attachments.get(inner) if isinstance(inner, nn.Module) else None
    if found is None:
        check_is_model(inner)
    return found


def _resolved(backbone: Backbone, policy: Policy) -> Plan:
    """The policy's plan for the backbone, after refusing parts that nobody can look into."""
    check_compiled({"core": backbone.core, "text decoder": backbone.text})
    widths = None if policy.budget is None else backbone.decoder_widths
    work = None if widths is None else partial(vision_only, shape=widths)
    return resolve(policy, backbone.shape, backbone.facts(), work)


@dataclass(frozen=True)
class _Weights:
    """Where the weights of the stages' modules come from."""

    source: str | PathLike[str] | None
    """What the caller named."""
    recorded: bool
    """Whether the policy is the one that the model's config records."""
    given: Any
    """The model as the caller passed it, in its wrappers."""


def _modules(backbone: Backbone, plans: Mapping[str, Plan | None], own: _Weights) -> StageModules:
    """The modules of the policies' stages, with their weights."""
    modules, weights = StageModules(backbone, plans.values()), own.source
    modules.check_not_wrapped(backbone.model, own.given)
    if not modules.stages:
        if weights is not None:
            raise PolicyError(
                "weights: given, but no stage of the policy has a module to load them into; leave them out"
            )
        return modules
    names = ", ".join(f"stages.{name}" for name in modules.stages)
    if weights is not None and not isinstance(weights, str | PathLike):
        raise PolicyError(f"weights: expected a safetensors file, or a folder with one, got {quoted(weights)}")
    if weights is None:
        home = getattr(backbone.model, "name_or_path", "")
        weights = find_weights(home, revision=getattr(backbone.model.config, "_commit_hash", None))
        if weights is None and own.recorded:
            raise PolicyError(
                f"attach: {names}: the recorded policy has trained weights, but {quoted(home)} has no {WEIGHTS}; name "
                "the folder that has it with `weights=`"
            )
        if weights is not None and not own.recorded and not knows_any(modules, weights):
            weights = None
    if weights is not None:
        load_weights(modules, weights)
        return modules
    blank = [name for name, stage in modules.stages.items() if stage.needs_training]
    if blank and not backbone.model.training:
        raise PolicyError(
            f"attach: stages.{blank[0]}: decides nothing before it is trained, and no weights are given; name a folder "
            "that has them with `weights=`, or put the model in `train()` to train it"
        )
    _log.warning("%s: starts with fresh weights; train it, or name a folder with `weights=`", names)
    return modules


def _attach(
    backbone: Backbone,
    plans: Mapping[str, Plan | None],
    default: str,
    weights: _Weights,
    *,
    labelled_only: bool = False,
    overlap: bool = False,
) -> ModelHooks:
    warn_if_untested()
    leave_uncompiled()
    core = backbone.core
    attachment = _attachments.setdefault(core, _Attachment())
    _attachments[backbone.model] = attachment
    if attachment.running:
        raise UnsupportedCall("attach: called inside a forward of this model; call it before or afterwards")
    shards = refusals.head_shards(backbone)
    for plan in plans.values():
        if plan is not None:
            refusals.check_model(backbone, plan, shards)
            for _, stage in plan.stages:
                stage.prepare(backbone)
    modules = _modules(backbone, plans, weights)
    turn = attachment.turns.take(sys._getframe())
    try:
        present = attachment.hooks
        if present is not None and present.flows:
            names = ", ".join(repr(flow.policy.name) for flow in present.flows.values() if flow is not None)
            raise UnsupportedModel(f"attach: the policy {names} is already attached to this model; detach it first")
        _clean(attachment)  # left by an interrupted attach or detach
        refusals.check_unshared(backbone)
        hooks = attachment.hooks = ModelHooks(
            backbone, attachment.turns, shards, modules, labelled_only=labelled_only, overlap=overlap
        )
        attachment.serials = frozenset(plan.serial for plan in plans.values() if plan is not None)
        attached_plans.update(dict.fromkeys(attachment.serials, _in_force(weakref.ref(hooks))))
        recorded = plans[default]
        if recorded is not None:
            attachment.recording = Recording(backbone.model.config)
            attachment.recording.put(recorded.policy)
        recording = attachment.recording
        hooks.install(
            {name: _flow(plan, hooks, recording if name == default else None) for name, plan in plans.items()}, default
        )
        return hooks
    finally:
        turn.end()


def _flow(plan: Plan | None, hooks: ModelHooks, recording: Recording | None) -> Flow | None:
    core = hooks.backbone.core
    return None if plan is None else Flow(plan, hooks, recording, lambda: _detach(core))


def _in_force(hooks: weakref.ref[ModelHooks]) -> Callable[[], bool]:
    """Whether hooks serve calls; those of a detachment that has begun serve none."""
    return lambda: bool(getattr(hooks(), "flows", None))


def _detach(core: Any) -> None:
    attachment = _attachments[core]
    if attachment.running:
        raise UnsupportedCall("detach: called inside a forward of this model; call it when the forward has ended")
    turn = attachment.turns.take(sys._getframe())
    try:
        _clean(attachment)
    finally:
        turn.end()


def _clean(attachment: _Attachment) -> None:
    """Remove everything from the model; safe to interrupt and repeat."""
    hooks, recording = attachment.hooks, attachment.recording
    if hooks is not None:
        hooks.remove()
    for serial in attachment.serials:
        attached_plans.pop(serial, None)
    if recording is not None:
        recording.remove()
    if hooks is not None:
        hooks.handle = None
    attachment.hooks = attachment.recording = None
    attachment.serials = frozenset()
    sweep()

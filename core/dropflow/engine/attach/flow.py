"""Attaching a policy to a model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.backbone.backbone import Backbone, backbone_for
from dropflow.backbone.versions import warn_if_untested
from dropflow.engine.attach import refusals
from dropflow.engine.attach.model_hooks import ModelHooks
from dropflow.engine.decoder.record import CallRecord, Report
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.policy.plan import Plan, resolve
from dropflow.policy.policy import Policy
from dropflow.policy.policy_file import Source, load_policy
from dropflow.policy.recorded import Recording, recorded_policy

_attached: weakref.WeakKeyDictionary[Any, weakref.ref[Flow]] = weakref.WeakKeyDictionary()
"""Flow of each attached core; weak on both sides, since a flow holds its model."""


def attach(
    model: Any,
    policy: Source | None = None,
    *,
    overrides: Sequence[str] = (),
    adapter: str | type[Backbone] | None = None,
) -> Flow:
    """Let `policy` govern every forward of `model` until the flow is detached or its `with` block ends.

    `policy` is a name, a path, a mapping or a `Policy`; without one, the policy recorded in the model's config counts.
    `overrides` are `path=value`. `adapter` names a backbone adapter where the model's `model_type` does not. Nothing of
    the model is changed but a few removable hooks, and `config.dropflow`, which holds the policy while it is attached:
    a model saved meanwhile, such as by a trainer, records it (see `Flow.record`).

    Raises `PolicyError` for a policy that does not fit the model, `UnsupportedModel` for a model that cannot be served
    (or has a flow attached already).
    """
    warn_if_untested()
    backbone = backbone_for(model, adapter)
    present = _flow_of(backbone)
    if present is not None:
        name = present.policy.name
        raise UnsupportedModel(f"attach: the policy {name!r} is attached to this model already; detach it first")
    source = recorded_policy(backbone.model.config) if policy is None else policy
    return Flow(backbone, resolve(load_policy(source, overrides), backbone.shape))


def _flow_of(backbone: Backbone) -> Flow | None:
    reference = _attached.get(backbone.core)
    return None if reference is None else reference()


class Flow:
    """A policy attached to a model; a context manager that detaches at its end."""

    def __init__(self, backbone: Backbone, plan: Plan) -> None:
        refusals.check_model(backbone, plan)
        for _, stage in plan.stages:
            stage.prepare(backbone)
        self._backbone, self._plan = backbone, plan
        self._service = ModelHooks(backbone, plan)
        self._service.flow = self
        self._recording = Recording(backbone.model.config, plan.policy)
        _attached[backbone.core] = weakref.ref(self)

    @property
    def policy(self) -> Policy:
        """The attached policy."""
        return self._plan.policy

    @property
    def plan(self) -> Plan:
        """The policy as resolved for this model."""
        return self._plan

    @property
    def attached(self) -> bool:
        """Whether the policy still governs the model."""
        return _flow_of(self._backbone) is self

    def report(self) -> Report:
        """Tokens per layer, FLOPs and KV bytes of the last prefill that brought images.

        Raises `UnsupportedCall` when there was none, or when the policy has no stages (nothing is watched then).
        """
        return self._last().report()

    def live(self) -> Bool[Tensor, "layers batch tokens"]:
        """Which tokens of the last prefill that brought images were live in front of each layer; errors as `report`."""
        return self._last().live()

    def merges(self) -> Mapping[int, Int[Tensor, "batch tokens"]]:
        """Boundary -> logical index of the token that each one's state was merged into there; its own for most.

        Boundaries where nothing was merged are left out. Of the last prefill that brought images; errors as `report`.
        """
        return dict(self._last().merges)

    def _last(self) -> CallRecord:
        if self._plan.idle:
            raise UnsupportedCall(f"report: the policy {self.policy.name!r} has no stages, so nothing is watched")
        if self._service.record is None:
            raise UnsupportedCall("report: no prompt with images has been run since this policy was attached")
        return self._service.record

    @contextmanager
    def visual(self, tokens: Bool[Tensor, "batch tokens"]) -> Iterator[None]:
        """State which tokens are visual, for prompts given as `inputs_embeds` with image features merged in already.

        It holds for this thread's calls of as many tokens, of any beam or returned sequence; those that continue a
        cache with another number of tokens, as decoding does, bring text. Other calls raise `UnsupportedCall`.
        """
        if tokens.dtype != torch.bool or tokens.dim() != 2:
            raise UnsupportedCall(
                f"visual: expected a torch.bool tensor (batch, tokens), got {tokens.dtype} {tuple(tokens.shape)}"
            )
        self._service.stated.visual = tokens
        try:
            yield
        finally:
            self._service.stated.visual = None

    def record(self) -> None:
        """Leave the policy in the model's config for good, so that models saved after `detach` record it, too.

        Raises `PolicyError` for a policy that `attach` could not read back, such as one whose stages are no entry
        points of an installed package.
        """
        self._recording.keep()

    def detach(self) -> None:
        """Take every hook off the model; harmless when done before."""
        self._service.remove()
        self._recording.remove()
        if self.attached:
            del _attached[self._backbone.core]

    def __enter__(self) -> Flow:
        if not self.attached:
            raise UnsupportedCall(
                f"flow: the policy {self.policy.name!r} was detached, and a flow serves once; call `dropflow.attach` "
                "again"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

"""One case of the conformance kit: a policy on a tiny model, and helpers to check and report it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dropflow.backbone.backbone import Backbone
from dropflow.engine.attach.attach import attach
from dropflow.engine.attach.flow import Flow
from dropflow.testing.families.tiny import SAMPLES, Part, Picture, Tiny
from dropflow.testing.oracle import MaskedOracle
from dropflow.testing.oracle_absent import AbsentOracle

BUDGET: Mapping[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

NO_OP = "1 (no-op identity)"
MASK = "2 (drop = mask)"
BATCH = "3 (batch invariance)"
ISOLATION = "4 (isolation)"
REFUSAL = "5 (loud refusal)"


class BrokenGuarantee(AssertionError):
    """Raised when a guarantee does not hold; the message names it, the layer or fact, and the size of the error."""


@dataclass(frozen=True)
class Case:
    """A policy on a tiny model."""

    name: str
    adapter: type[Backbone]
    tiny: Tiny
    policy: Mapping[str, Any]
    attention: str = "sdpa"
    side: str = "left"
    samples: Sequence[Sequence[Part]] = SAMPLES
    overlap: bool = False
    """Whether the case's policy encodes images beside the text layers."""
    absent: bool = False
    """Whether to compare with the absent oracle where the masked one would also do."""
    models: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The models of `tiny` that have been built, by their attention; cases made by `replace` share them."""

    @cached_property
    def oracle(self) -> type[MaskedOracle]:
        """The oracle: the masked one, or the absent one if asked for or if some layer has no attention."""
        masks = self.adapter(self.model).shape.attending is None and not self.absent
        return MaskedOracle if masks else AbsentOracle

    @property
    def model(self) -> Any:
        """The model, shared by all checks of this case."""
        if self.attention not in self.models:
            self.models[self.attention] = self.tiny.model(self.attention)
        return self.models[self.attention]

    @cached_property
    def drawn(self) -> tuple[dict[str, Any], list[list[Picture]]]:
        """The inputs of the batch and the pictures of each sample."""
        return self.tiny.prompt(self.samples, side=self.side)

    @property
    def inputs(self) -> dict[str, Any]:
        """A new mapping of the batch's inputs."""
        return dict(self.drawn[0])

    @property
    def real(self) -> Tensor:
        """Tokens that are not padding, boolean (batch, tokens)."""
        mask: Tensor = self.drawn[0]["attention_mask"]
        return mask.bool()

    @property
    def text(self) -> Any:
        """The model's text decoder."""
        return self.adapter(self.model).text

    def attach(self, policy: Mapping[str, Any] | None = None) -> Flow:
        """Attach the case's policy, or another one; modules of stages start fresh, whatever they decide."""
        model, training = self.model, self.model.training
        late = policy is None or self.policy.get("stages", {}).items() <= policy["stages"].items()
        model.training = True  # the model's own flag, which allows fresh modules; `train()` would visit every module
        try:
            flow = attach(model, policy or self.policy, adapter=self.adapter, overlap=self.overlap and late)
        finally:
            model.training = training
        for module in flow.modules.values():
            module.train(training)
        return flow

    def single(self, sample: int) -> dict[str, Any]:
        """Inputs of one sample alone, without padding."""
        row = self.drawn[0]["input_ids"][sample, self.real[sample]].tolist()
        return self.tiny.collate([row], [self.drawn[1][sample]], self.side)

    def padded_left(self) -> Case:
        """The same case with left padding, as generation requires."""
        return replace(self, side="left")

    def with_samples(self, samples: Sequence[Sequence[Part]]) -> Case:
        """The same case on another batch."""
        return replace(self, samples=samples)

    def broken(self, guarantee: str, what: str) -> BrokenGuarantee:
        """The error to raise for a broken guarantee of this case."""
        return BrokenGuarantee(f"{self.name}: guarantee {guarantee} is broken: {what}")


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference divided by the largest expected magnitude; infinite if any value is not finite."""
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-30))


@contextmanager
def layer_inputs(case: Case) -> Iterator[list[Tensor]]:
    """Collects the hidden states that each decoder layer actually receives."""
    seen: list[Tensor] = []
    layers = case.text._modules["layers"]
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def text_inputs(text: Any) -> Iterator[list[dict[str, Any]]]:
    """Collects what the core hands to the decoder `text`, as arguments of `MaskedOracle`: `embeds` and `deepstack`."""
    seen: list[dict[str, Any]] = []

    def see(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        deepstack = kwargs.get("deepstack_visual_embeds")
        rows = None if deepstack is None else [layer.detach() for layer in deepstack]
        seen.append({"embeds": kwargs["inputs_embeds"].detach(), "deepstack": rows})

    # first, since the engine's own hook takes deepstack features out
    handle = text.register_forward_pre_hook(see, with_kwargs=True, prepend=True)
    try:
        yield seen
    finally:
        handle.remove()

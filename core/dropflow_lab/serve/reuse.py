"""What requests about the same pictures share: prefixes of the model, kept within a limit of memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import dropflow
from dropflow.backbone.backbone import backbone_for
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow_lab.serve.prompt import PER_TOKEN, Prompt
from dropflow_lab.serve.waiting import Waiting

_REMEMBERED = 4096
"""Beginnings of prompts that are remembered by their digest, to know one that returns."""

Inputs = Callable[[Waiting], dict[str, Any]]
"""Returns the model's inputs for one request, on its device."""


class Reuse:
    """Finds the prefix that all requests of a batch can begin with, and makes one where a beginning returns.

    A beginning is what a prompt has up to its last visual token: pictures and text, under a policy, of one owner. One
    that comes for the first time is asked anew, since most never return. `digest` may be called in any thread, the rest
    in the model's own.
    """

    def __init__(self, model: Any, flows: dropflow.FlowSet, limit: int) -> None:
        """`limit` bounds the bytes that all prefixes together hold; 0 makes none."""
        self._backbone, self._flows = backbone_for(model), flows
        self._prefixes = dropflow.Prefixes(limit) if limit else None
        self._worth: OrderedDict[str, bool] = OrderedDict()  # whether a beginning that came before can have a prefix
        self._refused: set[str] = set()  # policies under which the model takes no prefixes
        self.hits: dict[str, int] = dict.fromkeys(flows, 0)
        """Requests whose pictures and text before them were not run for them, by policy."""
        self.made: dict[str, int] = dict.fromkeys(flows, 0)
        """Prefixes that were made, by policy."""

    @property
    def nbytes(self) -> int:
        """Bytes that all prefixes hold."""
        return 0 if self._prefixes is None else self._prefixes.nbytes

    def digest(self, prompt: Prompt, policy: str, owner: str) -> str | None:
        """What stands for the beginning of a prompt; `None` where it can have no prefix.

        `owner` is whose request it is: nobody's request ever begins with a prefix of somebody else.
        """
        flow = self._flows[policy]
        if self._prefixes is None or flow is None or flow.plan.idle:
            return None
        visual = self._backbone.placeholders(prompt.inputs["input_ids"])[0].nonzero()
        if not len(visual):
            return None
        digest, end = hashlib.sha256(repr((policy, owner)).encode()), int(visual[-1]) + 1
        for name, value in sorted(prompt.inputs.items()):
            if not isinstance(value, Tensor):
                return None
            own = value[:, :end] if name in PER_TOKEN else value
            digest.update(repr((name, str(own.dtype), tuple(own.shape))).encode())
            digest.update(own.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def shared(self, batch: Sequence[Waiting], inputs: Inputs) -> dropflow.Prefix | None:
        """The prefix that all requests of a batch begin with; `None` to ask them anew.

        To be called while the batch's policy is in use.
        """
        beginnings = [request.beginning for request in batch]
        first = beginnings[0]
        returns = len(batch) > 1 or first in self._worth
        for one in beginnings:
            self._remember(one)
        if first is None or set(beginnings) != {first} or not returns or not self._worth[first]:
            return None
        return self._prefix(first, batch, inputs)

    def forget(self, batch: Sequence[Waiting]) -> None:
        """Make no prefix of this beginning any more: a request did not fit it."""
        if batch[0].beginning is not None:
            self._worth[batch[0].beginning] = False

    def _prefix(self, beginning: str, batch: Sequence[Waiting], inputs: Inputs) -> dropflow.Prefix | None:
        assert self._prefixes is not None
        policy, made = batch[0].policy, []
        flow = self._flows[policy]
        if policy in self._refused or flow is None:
            return None

        def make() -> dropflow.Prefix:
            with dropflow.questions([batch[0].prompt.question]):
                made.append(flow.prefix(**inputs(batch[0])))
            return made[0]

        try:
            prefix = self._prefixes.get(beginning, make)
        except UnsupportedModel:
            self._refused.add(policy)
            return None
        except UnsupportedCall:
            self.forget(batch)
            return None
        self._worth[beginning] = prefix.nbytes <= self._prefixes.limit  # or it would be made for every request
        self.made[policy] += len(made)
        self.hits[policy] += len(batch) - len(made)
        return prefix

    def _remember(self, beginning: str | None) -> None:
        if beginning is not None:
            self._worth.setdefault(beginning, True)
            self._worth.move_to_end(beginning)
            while len(self._worth) > _REMEMBERED:
                self._worth.popitem(last=False)

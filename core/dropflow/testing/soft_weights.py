"""Records the soft weights that stages return during training, so that a masked run can use the same."""

from __future__ import annotations

from types import TracebackType
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor

from dropflow.engine.attach.flow import Flow
from dropflow.lifecycle.payloads import Keep, PruneCall


class GivenWeights:
    """While open, records the weights in every `prune` answer under `flow`, with their graphs.

    The masked run receives each of them as a leaf (`log_weights`); `backward` then passes the gradients of these leaves
    on through the stages' own graphs, so that the masked run's gradients include those of the selection.
    """

    def __init__(self, flow: Flow) -> None:
        self._hooks = flow.plan.hooks
        self._given: list[tuple[PruneCall, Keep, Tensor, Tensor]] = []
        self._patch = mock.patch.object(self._hooks, "prune", self._prune)
        self._ask = self._hooks.prune

    def __enter__(self) -> GivenWeights:
        self._patch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.stop()

    def _prune(self, call: PruneCall, stage: Any) -> Keep | None:
        answer = self._ask(call, stage)
        if answer is not None and answer.weights is not None and answer.weights.requires_grad and call.differentiable:
            self._given.append((call, answer, answer.weights, answer.weights.detach().requires_grad_()))
        return answer

    def log_weights(self, layers: int, batch: int, tokens: int) -> Float[Tensor, "layers batch tokens"] | None:
        """Logarithm of the weights before every layer, by logical token; `None` if no stage returned any."""
        if not self._given:
            return None
        whole = self._given[0][3].new_zeros(layers, batch, tokens)
        for call, answer, _, leaf in self._given:
            counts = answer.mask & (call.image_id >= 0) & ~call.protected
            own = torch.where(counts, leaf, 1).log()
            own = own.new_zeros(batch, tokens).scatter_add(1, call.index, own)
            after = torch.arange(layers, device=own.device) >= call.boundary
            whole = whole + after[:, None, None] * own
        return whole

    def backward(self) -> None:
        """Pass the gradients of the weights on through the graphs in which the stages computed them."""
        reached = [(given, leaf.grad) for _, _, given, leaf in self._given if leaf.grad is not None]
        if reached:
            torch.autograd.backward([given for given, _ in reached], [gradient for _, gradient in reached])

"""The absent oracle: every layer runs on the live tokens of one sample alone, with no padding and no cache.

For layers with softmax attention over their own keys it equals the masked oracle. It also holds for layers with a
recurrent state or a convolution, in which a masked token would still decay the state or enter the convolution. It
shares no code with the engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.testing.oracle import MaskedOracle


class AbsentOracle(MaskedOracle):
    """While open, every decoder layer of `model` runs sample by sample on the sequence of its live tokens alone.

    Tokens keep their positions. Its arguments are those of `MaskedOracle`, without soft weights, which only attention
    can take.
    """

    name: ClassVar[str] = "absent"
    """What error messages call the run."""

    def __enter__(self) -> AbsentOracle:
        if self._log_weights is not None:
            raise ValueError("the absent oracle takes no soft weights; use the masked oracle")
        super().__enter__()
        layers: Any = self._backbone.text.layers
        self._shadowed = list(layers)
        self._shared: dict[int, dict[Any, tuple[Tensor, ...]]] = {}
        self._made: dict[tuple[int, Any], Tensor] = {}
        for number, layer in enumerate(self._shadowed):
            self._names = list(inspect.signature(layer.forward).parameters)[1:]
            layer.forward = partial(self._forward, number, layer.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._shadowed:
            del layer.forward
        super().__exit__(kind, error, trace)

    def _mask(self, mask: Tensor | None, live: Tensor, hidden: Tensor, number: int) -> Tensor | None:  # noqa: ARG002
        return mask

    def _forward(self, number: int, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, in which tokens that are not live keep their input."""
        live = self._of(number, hidden)
        samples = []
        if number == 0:
            self._shared, self._made = {sample: {} for sample in range(len(live))}, {}
        for sample, own in enumerate(live):
            rows, tokens = hidden.narrow(-3, sample, 1), own.nonzero()[:, 0]
            if len(tokens):
                cut = {name: self._cut(name, value, sample, tokens, len(own)) for name, value in kwargs.items()}
                if "shared_kv_states" in kwargs:
                    cut["shared_kv_states"] = shared = self._read_shared(sample, tokens)
                if "attention_mask" in kwargs:
                    cut["attention_mask"] = self._seen(number, kwargs["attention_mask"], sample, tokens, own)
                moved = [
                    self._cut(name, value, sample, tokens, len(own))
                    for name, value in zip(self._names, args, strict=False)
                ]
                found = forward(rows.index_select(-2, tokens), *moved, **cut)
                found = found[0] if isinstance(found, tuple) else found
                rows = rows.index_copy(rows.dim() - 2, tokens, found)
                if "shared_kv_states" in kwargs:
                    for kind in shared.keys() - self._shared[sample].keys():
                        self._shared[sample][kind], self._made[sample, kind] = shared[kind], tokens
            samples.append(rows)
        return torch.cat(samples, -3)

    def _read_shared(self, sample: int, tokens: Int[Tensor, "live"]) -> dict[Any, tuple[Tensor, ...]]:
        """The keys and values that earlier layers made of a sample, without those of tokens that are not live."""
        found = {}
        for kind, states in self._shared[sample].items():
            columns = torch.isin(self._made[sample, kind], tokens).nonzero()[:, 0]
            found[kind] = tuple(part.index_select(2, columns) for part in states)
        return found

    def _cut(self, name: str, value: Any, sample: int, tokens: Int[Tensor, "live"], total: int) -> Any:
        """The part of a per-token argument (..., batch or 1, tokens[, dim]) that belongs to the tokens of a sample."""
        if isinstance(value, tuple | list):
            return type(value)(self._cut(name, part, sample, tokens, total) for part in value)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        dim = -2 if name.startswith(("position_embeddings", "per_layer_input")) else -1
        if value.dim() < -dim or value.shape[dim] != total:
            return value
        value = value.index_select(dim, tokens)
        return value if value.dim() == -dim or value.shape[dim - 1] == 1 else value.narrow(dim - 1, sample, 1)

    def _seen(
        self, number: int, mask: Tensor | None, sample: int, tokens: Int[Tensor, "live"], own: Bool[Tensor, "tokens"]
    ) -> Tensor | None:
        """The mask among the tokens of a sample; `None` for a recurrent layer, which only needs to know of padding."""
        if not self._backbone.shape.attends(number):
            return None
        if mask is not None:
            rows = mask[min(sample, len(mask) - 1)][None]
            mask = rows[:, :, tokens][..., tokens]
        later = self._seen_later(number, len(self._live[0]), len(own))
        if later is None or len(own) == self._live.shape[2]:
            return mask
        if mask is None:
            mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()[None, None]
        seen = later[sample][tokens][:, tokens][None, None]
        if mask.dtype == torch.bool:
            return mask & seen
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

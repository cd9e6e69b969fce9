"""The masked oracle: a full-length run in which drops are masks, with nothing removed and no cache.

It shares no code with the engine: ordinary hooks on the layers hide dropped keys, and all they know of the engine is
one boolean per layer and token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from dropflow.backbone.backbone import Backbone, backbone_for


class MaskedOracle:
    """While open, every forward of `model` masks the tokens that are not in `live`; calls must not use a cache.

    `live` (layers, batch, tokens) says which tokens of the prompt take part in each layer; tokens after the prompt
    take part everywhere. Visual tokens that first take part at layer `e` enter there with their raw embeddings.
    A position whose token is not live at the end reads the last live token at or before it. `embeds` (batch, tokens,
    dim) replaces the prompt's embeddings, and `deepstack` (visual tokens, dim) what the decoder adds to visual states
    after each of its first layers, for stages that change features. `held` (layers, batch, tokens) says which
    tokens of the prompt later tokens can still see, for stages that evict cache entries, and `reads` (layers, batch,
    steps, tokens) which of them each of the first tokens after the prompt sees, for stages that park some. `merges`
    (boundary -> (batch, tokens)) gives the token into which each token's state is averaged before a layer.
    `log_weights` (layers, batch, tokens) are added to the attention scores of each layer's keys, for stages that return
    soft weights.
    """

    name: ClassVar[str] = "masked"
    """What error messages call the run."""

    def __init__(
        self,
        model: Any,
        live: Bool[Tensor, "layers batch tokens"],
        adapter: str | type[Backbone] | None = None,
        *,
        embeds: Tensor | None = None,
        deepstack: Sequence[Tensor] | None = None,
        held: Bool[Tensor, "layers batch tokens"] | None = None,
        reads: Bool[Tensor, "layers batch steps tokens"] | None = None,
        merges: Mapping[int, Int[Tensor, "batch tokens"]] | None = None,
        log_weights: Float[Tensor, "layers batch tokens"] | None = None,
    ):
        self._backbone = backbone_for(model, adapter)
        self._live, self._embeds, self._log_weights = live, embeds, log_weights
        self._held, self._reads = held, reads
        self._merges, self._deepstack = merges or {}, deepstack
        self._handles: list[Any] = []
        self.hidden: list[Tensor] = []
        """Input of every layer in the last forward, each (*streams, batch, tokens, dim)."""
        self._raw = torch.empty(0)

    def __enter__(self) -> MaskedOracle:
        text = self._backbone.text
        layers: Any = text.layers
        self._handles = [
            layer.register_forward_pre_hook(self._hook(number), with_kwargs=True) for number, layer in enumerate(layers)
        ]
        self._handles.append(text.register_forward_hook(self._read))
        self._handles.append(text.register_forward_pre_hook(self._whole, with_kwargs=True))
        if self._embeds is not None:
            self._handles.append(text.register_forward_pre_hook(self._replace, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, number: int) -> Any:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0]
            caches = {name: value for name, value in kwargs.items() if isinstance(value, Cache)}
            if any(cache.get_seq_length(number) for cache in caches.values()):
                raise ValueError("the masked oracle runs without a cache; pass use_cache=False")
            if number == 0:
                self._raw, self.hidden = hidden, []
            live = self._of(number, hidden)
            if number:
                entering = live & ~self._of(number - 1, hidden)
                hidden = torch.where(entering[:, :, None], self._raw, hidden)
            if number in self._merges:
                hidden = self._merged(hidden, self._merges[number])
            self.hidden.append(hidden)
            mask = self._mask(kwargs["attention_mask"], live, hidden, number)
            changed = dict.fromkeys(caches) | {"attention_mask": mask, "use_cache": False}
            return (hidden, *args[1:]), kwargs | changed

        return before

    @staticmethod
    def _merged(hidden: Tensor, into: Tensor) -> Tensor:
        """Hidden states in which every merge target holds the mean of its own state and those merged into it."""
        if hidden.dim() > 3:
            return torch.stack([MaskedOracle._merged(stream, into) for stream in hidden])
        into = into.repeat_interleave(hidden.shape[0] // into.shape[0], 0)
        rows = list(hidden.unbind(0))
        for sample, own in enumerate(into.tolist()):
            for target in {t for token, t in enumerate(own) if t != token}:
                members = [token for token, t in enumerate(own) if t == target]
                mean = torch.stack([hidden[sample, member] for member in members]).mean(0)
                rows[sample] = torch.cat((rows[sample][:target], mean[None], rows[sample][target + 1 :]))
        return torch.stack(rows)

    @staticmethod
    def _whole(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keeps a decoder from cutting its states to the last tokens between two layers."""
        return args, kwargs | dict.fromkeys(kwargs.keys() & {"logits_to_keep"}, 0)

    def _replace(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert self._embeds is not None
        whole = kwargs["inputs_embeds"]
        prompt = self._embeds.to(whole)
        changed: dict[str, Any] = {"inputs_embeds": torch.cat((prompt, whole[:, prompt.shape[1] :]), 1)}
        if self._deepstack is not None:
            changed["deepstack_visual_embeds"] = list(self._deepstack)
        return args, kwargs | changed

    def _of(self, number: int, hidden: Tensor, lives: Tensor | None = None) -> Bool[Tensor, "batch tokens"]:
        """A layer's row of `lives` for this forward, expanded over beams and true after the prompt."""
        live = (self._live if lives is None else lives)[number].to(hidden.device)
        live = live.repeat_interleave(hidden.shape[-3] // live.shape[0], 0)
        return torch.nn.functional.pad(live, (0, hidden.shape[-2] - live.shape[1]), value=True)

    def _mask(self, mask: Tensor | None, live: Tensor, hidden: Tensor, number: int) -> Tensor | None:
        tokens = hidden.shape[-2]
        if mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril()[None, None]
        if mask.dim() == 2:
            raise ValueError("the masked oracle needs 'sdpa' or 'eager' attention")
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        own = torch.eye(tokens, dtype=torch.bool, device=hidden.device)
        seen = seen & live[:, None, None, :]
        later = self._seen_later(number, len(live), tokens)
        if later is not None:
            seen = seen & later.to(seen.device)[:, None]
        seen = seen | own
        if self._log_weights is not None:
            added = self._log_weights[number][:, None, None, :].to(hidden.dtype)
            return torch.where(seen, added, torch.finfo(hidden.dtype).min)
        if mask.dtype == torch.bool:
            return seen
        return torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~seen, torch.finfo(mask.dtype).min
        )

    def _seen_later(self, number: int, batch: int, tokens: int) -> Bool[Tensor, "batch tokens tokens"] | None:
        """What each token of a layer may see of the others, as far as the cache decides; `None` for everything."""
        if self._held is None and self._reads is None:
            return None
        prompt, beams = self._live.shape[2], batch // self._live.shape[1]
        seen = torch.ones(self._live.shape[1], tokens, tokens, dtype=torch.bool)
        if self._held is not None:
            seen[:, prompt:, :prompt] &= self._held[number][:, None]
        if self._reads is not None:
            own = self._reads[number][:, : tokens - prompt]
            seen[:, prompt : prompt + own.shape[1], :prompt] &= own
        return seen.repeat_interleave(beams, 0)

    def _read(self, _: Any, __: Any, output: Any) -> Any:
        hidden = output[0]
        source = last_live(self._of(len(self._live) - 1, hidden))
        rows = hidden.gather(1, source.clamp(min=0)[:, :, None].expand_as(hidden))
        output["last_hidden_state"] = torch.where((source < 0)[:, :, None], 0.0, rows)
        return output


def last_live(live: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Index of the last live token at or before each token; -1 where there is none."""
    index = torch.arange(live.shape[1], device=live.device).expand_as(live)
    return torch.where(live, index, -1).cummax(1).values

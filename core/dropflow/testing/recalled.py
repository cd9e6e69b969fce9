"""Checks recall against its definition, layer by layer, on the plain model.

For every turn, the whole conversation runs again: tokens of earlier turns have the states of their own turn's run, and
each layer from the boundary on sees of the visual tokens only those that were chosen for the turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import DynamicCache

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.attach.flow import Flow
from dropflow.engine.tokens.cache import flow_layers
from dropflow.engine.tokens.cache_index import PADDING
from dropflow.errors import PolicyError, UnsupportedModel
from dropflow.testing.case import MASK, Case, relative_error, text_inputs


class Conversation:
    """A conversation with an attached model, call by call."""

    def __init__(self, model: Any, batch: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.mask = torch.zeros(batch, 0, dtype=torch.long)
        """1 for tokens so far that are not padding."""
        self.ids = torch.zeros(batch, 0, dtype=torch.long)

    def ask(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Bool[Tensor, "layers batch tokens"]]:
        """Logits of one call, and which tokens of the conversation each layer holds after it."""
        ids = inputs["input_ids"]
        own = inputs.get("attention_mask", torch.ones_like(ids))
        self.mask, self.ids = torch.cat((self.mask, own), 1), torch.cat((self.ids, ids), 1)
        given = {**inputs, "attention_mask": self.mask, CACHE_ARGUMENT: self.cache, "use_cache": True}
        if self.mask.all():
            del given["attention_mask"]  # some families would take it for that of the call's tokens alone
        logits: Tensor = self.model(**given).logits
        return logits, self.held()

    def held(self) -> Bool[Tensor, "layers batch tokens"]:
        """Which tokens each layer holds; padding is not counted."""
        layers = flow_layers(self.cache)
        held = torch.zeros(len(layers), *self.ids.shape, dtype=torch.bool)
        for number, layer in layers.items():
            index = layer.full_index()
            shown = index.filled & (index.image_id != PADDING)
            for sample, own in enumerate(shown):
                held[number, sample, index.logical[sample, own]] = True
        return held


@contextmanager
def redone(
    model: Any,
    text: Any,
    held: Bool[Tensor, "layers batch tokens"],
    frozen: Sequence[tuple[Tensor, Tensor]] | None,
    late: Bool[Tensor, "batch tokens"],
    entry: int,
    prompt: Mapping[str, Any],
) -> Iterator[list[Tensor]]:
    """The plain model over a whole conversation: each layer sees what it `held`, and frozen tokens have given states.

    `frozen` has for each layer the tokens (batch, tokens) and the states (batch, tokens, dim). The tokens `late` enter
    at boundary `entry` as they are. `prompt` is what the decoder `text` received in the first call (see `text_inputs`),
    whose features `encode` stages may have changed. Yields the states that every layer receives.
    """
    seen: list[Tensor] = []
    tokens = held.shape[2]
    causal, itself = torch.ones(tokens, tokens, dtype=torch.bool).tril(), torch.eye(tokens, dtype=torch.bool)

    def enter(number: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = "hidden_states" in kwargs
            hidden = kwargs["hidden_states"] if named else args[0]
            if number <= entry:
                hidden = torch.where(late[..., None], (seen or [hidden])[0], hidden)
            elif frozen is not None:
                hidden = torch.where(frozen[number][0][..., None], frozen[number][1], hidden)
            seen.append(hidden)
            shown = causal & held[number][:, None, None] | itself
            if model.config._attn_implementation == "eager":
                shown = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
            kwargs = {**kwargs, "attention_mask": shown}
            return (args, {**kwargs, "hidden_states": hidden}) if named else ((hidden, *args[1:]), kwargs)

        return hook

    def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds, changed = kwargs["inputs_embeds"], prompt["embeds"]
        kwargs = {**kwargs, "inputs_embeds": torch.cat((changed, embeds[:, changed.shape[1] :]), 1)}
        return args, kwargs | ({"deepstack_visual_embeds": prompt["deepstack"]} if prompt["deepstack"] else {})

    layers = text._modules["layers"]._modules.values()
    handles = [layer.register_forward_pre_hook(enter(n), with_kwargs=True) for n, layer in enumerate(layers)]
    handles.append(text.register_forward_pre_hook(begin, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def turns_beside(
    model: Any,
    text: Any,
    flow: Flow,
    first: Mapping[str, Any],
    turns: Sequence[Mapping[str, Any]],
    visual: Bool[Tensor, "batch tokens"],
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """For every call of a conversation under `flow`, its logits and those of the definition, on text tokens alone.

    Also what every layer held after each call. `visual` are those of the first call; detaches the flow.
    """
    conversation, boundary, entry = Conversation(model, len(visual)), flow.plan.asks_from, flow.plan.window.entry
    with text_inputs(text) as given:
        calls = [conversation.ask(turn) for turn in (first, *turns)]
    flow.detach()
    found, frozen, start = [], None, 0
    for number, (logits, held) in enumerate(calls):
        end = held.shape[2]
        mask, ids = conversation.mask[:, :end], conversation.ids[:, :end]
        own = torch.nn.functional.pad(visual, (0, end - visual.shape[1]))
        rest = {name: value for name, value in first.items() if name not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in rest:
            rest["mm_token_type_ids"] = torch.nn.functional.pad(rest["mm_token_type_ids"], (0, end - visual.shape[1]))
        with redone(model, text, held, frozen, own, entry, given[0]) as states:
            expected = model(**rest, input_ids=ids, attention_mask=mask, use_cache=False).logits
        shown = (mask.bool() & ~own)[:, start:]  # a visual token that is dropped reads another one's logits
        found.append((logits[shown], expected[:, start:][shown]))
        more = calls[number + 1][1].shape[2] - end if number + 1 < len(calls) else 0
        frozen = [
            (
                torch.nn.functional.pad(~own if layer > boundary else torch.ones_like(own), (0, more)),
                torch.nn.functional.pad(state, (0, 0, 0, more)),
            )
            for layer, state in enumerate(states)
        ]
        start = end
    return found, [held for _, held in calls]


@torch.no_grad()
def check_recall(case: Case) -> float:
    """The part of guarantee 2 that concerns later turns under `recall: true`.

    Nothing is checked for stages and families with which it is refused, and for stages that merge. Returns the largest
    relative error.
    """
    recalling = replace(case.padded_left(), policy={**case.policy, "recall": True})
    backbone = case.adapter(recalling.model)
    sample = max(range(len(case.samples)), key=lambda number: len(recalling.drawn[1][number]))
    first = recalling.single(sample)
    visual = backbone.placeholders(first["input_ids"])
    words = first["input_ids"][:, -4:]
    if bool(visual[:, -4:].any()):
        return 0.0
    try:
        flow = recalling.attach()
    except (PolicyError, UnsupportedModel):
        return 0.0
    with flow:
        try:
            recalling.model(**first)
        except UnsupportedModel:
            return 0.0
        if flow.plan.uniform or flow.merges():
            return 0.0
        turns = [{"input_ids": words[:, order]} for order in ([2, 0, 1], [3, 3, 1, 0])]
        found, _ = turns_beside(recalling.model, backbone.text, flow, first, turns, visual)
    worst = 0.0
    for number, (logits, expected) in enumerate(found):
        error = relative_error(logits, expected)
        if not error < case.tiny.tolerance:
            raise case.broken(
                MASK,
                f"logits of turn {number + 1} under `recall: true` differ from those of its definition by {error:.1e}, "
                f"allowed {case.tiny.tolerance:.0e}",
            )
        worst = max(worst, error)
    return worst

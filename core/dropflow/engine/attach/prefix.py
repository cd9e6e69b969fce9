"""Prefixes: what several questions about the same images share, run once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.decoder.prefix_runs import Keeping, PrefixKept
from dropflow.engine.tokens.ahead import Ahead, begin_with, begins_at
from dropflow.engine.tokens.cache import check_cache, convert_cache, is_flow_cache
from dropflow.errors import UnsupportedCall, UnsupportedModel, quoted

if TYPE_CHECKING:
    from dropflow.engine.attach.flow import Flow
    from dropflow.engine.attach.model_hooks import ModelHooks

_KINDS = ("token_type_ids", "mm_token_type_ids")
"""What some processors give to say of which kind a token is, 0 for text."""
_OF_TOKENS = ("input_ids", "attention_mask", *_KINDS)
"""What a processor gives for every token of a prompt."""
_OF_CALLS = (
    *(CACHE_ARGUMENT, "use_cache", "labels", "inputs_embeds", "position_ids", "cache_position", "logits_to_keep"),
    *("return_dict", "output_attentions", "output_hidden_states"),
)
"""What callers ask of a forward, which no processor gives."""


class Prefix:
    """The images of a prompt and the text before them, run up to the first boundary that may depend on the question.

    Made by `Flow.prefix`; holds one sample, which any number of questions may begin with. Its memory is freed with it.
    """

    def __init__(self, flow: Flow, ahead: Ahead, inputs: dict[str, Any], pixels: frozenset[str], config: Any) -> None:
        """`inputs` are those of the prompt it was made from, of which `pixels` are not kept.

        `config`, of the text decoder, says of what kinds the layers of a cache are.
        """
        self._flow, self._ahead, self._given, self._config = flow, ahead, frozenset(inputs), config
        kinds = {name: inputs[name] for name in _KINDS if inputs.get(name) is not None}
        self._kinds = {name: value[:, : ahead.tokens].clone() for name, value in kinds.items()}
        self._inputs = {name: value for name, value in inputs.items() if name not in {*_OF_TOKENS, *pixels}}

    @property
    def tokens(self) -> int:
        """Number of tokens, visual ones included."""
        return self._ahead.tokens

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens before any were dropped."""
        return int(self._ahead.prompt.visual.sum())

    @property
    def boundary(self) -> int:
        """The boundary up to which its tokens have run: layers before it run only on what follows the prefix."""
        return self._ahead.boundary

    @property
    def serves(self) -> bool:
        """Whether questions can still begin with it: its policy is attached."""
        return self._flow.attached

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds on the model's devices."""
        return self._ahead.nbytes

    def inputs(self, **inputs: Any) -> dict[str, Any]:
        """Inputs of the model or of `generate` for prompts that begin with the prefix.

        `inputs` are whole prompts, as the processor gives them: `input_ids` (batch, tokens), `attention_mask` if they
        are padded, on either side, and kinds of tokens. Pixels and sizes of images are ignored, since the prefix has
        them. What else the model or `generate` is to get goes beside what is returned, which holds a cache for one
        call; ask again with new inputs. That cache grows, unless `past_key_values` is a new `StaticCache` to use
        instead, or `generate` is asked for one by `cache_implementation="static"`.

        Raises `UnsupportedCall` for other inputs, where a prompt does not begin with the prefix, and once the policy is
        detached.
        """
        _check_attached(self._flow)
        ids, mask = _tokens_in(inputs, "whole prompts")
        self._check_names(inputs)
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self._check_kinds(inputs, begins_at(self._ahead, ids, valid))
        given = {name: value for name, value in inputs.items() if name in _OF_TOKENS}
        return {
            **{name: _repeated(value, len(ids)) for name, value in self._inputs.items()},
            **given,
            CACHE_ARGUMENT: self._begun(inputs.get(CACHE_ARGUMENT)),
        }

    def _begun(self, cache: Any) -> Any:
        """A cache that begins with the prefix: the caller's static one, or else one that grows."""
        plan = self._flow.plan
        if cache is None:
            cache = DynamicCache(config=self._config)
        elif not isinstance(cache, StaticCache) or is_flow_cache(cache) or cache.get_seq_length():
            raise UnsupportedCall(
                f"{CACHE_ARGUMENT}: expected a new StaticCache, got {type(cache).__name__}; leave it out for a cache "
                "that grows"
            )
        check_cache(cache, plan.shape, uniform=plan.uniform)
        convert_cache(cache, plan.shape, uniform=plan.uniform, written_by=plan.identity)
        begin_with(cache, self._ahead)
        return cache

    def _check_names(self, given: Iterable[str]) -> None:
        unknown = sorted(set(given) - {*_OF_TOKENS, *self._given, CACHE_ARGUMENT})
        if unknown:
            raise UnsupportedCall(
                f"prefix: {unknown[0]}: not among the inputs that the prefix was made from; pass it to the model "
                "beside what is returned"
            )

    def _check_kinds(self, inputs: Mapping[str, Any], first: Tensor) -> None:
        """Refuse kinds of tokens that are not those of the prefix, by which its tokens may see others."""
        places = first[:, None] + torch.arange(self.tokens, device=first.device)
        for name in _KINDS:
            own, given = self._kinds.get(name), inputs.get(name)
            same = (own is None) == (given is None)
            if own is not None and given is not None:
                same = bool((given.gather(1, places.to(given.device)) == own.to(given.device)).all())
            if not same:
                raise UnsupportedCall(
                    f"{name}: not those of the prompt that the prefix was made from; pass all that the processor gives "
                    "for every prompt, here and there"
                )

    def inputs_after(self, **inputs: Any) -> dict[str, Any]:
        """The same from what follows the prefix alone: `input_ids` and, if padded, `attention_mask` (batch, tokens).

        Other inputs are those of `inputs`, except kinds of tokens, since what follows is text.
        """
        ids, mask = _tokens_in(inputs, "what follows the prefix")
        mask = torch.ones_like(ids) if mask is None else mask
        self._check_names(name for name in inputs if name not in _KINDS)
        own = self._ahead.ids.to(ids).expand(len(ids), -1)
        ids, mask = torch.cat((own, ids), 1), torch.cat((torch.ones_like(own), mask), 1)
        # padding goes to the left of the prefix
        order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
        given = {"input_ids": ids, "attention_mask": mask}
        for name, kinds in self._kinds.items():
            given[name] = kinds.new_zeros(mask.shape)
            given[name][:, : self.tokens] = kinds
        given = {name: value.gather(1, order.to(value.device)) for name, value in given.items()}
        return self.inputs(**given, **{CACHE_ARGUMENT: inputs.get(CACHE_ARGUMENT)})


class Prefixes:
    """Prefixes by a key of the caller's, such as a digest of the images and the text before them.

    Those that were used least recently are let go as soon as all together hold more than `limit` bytes. Several threads
    may use it.
    """

    def __init__(self, limit: int) -> None:
        """Raises `ValueError` for a limit that is no positive number of bytes."""
        if not isinstance(limit, int | float) or isinstance(limit, bool) or not limit > 0:
            raise ValueError(f"limit: expected a positive number of bytes, got {quoted(limit)}")
        self.limit = limit
        self._held: OrderedDict[Hashable, Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Prefix]) -> Prefix:
        """The prefix under `key`; where none is there that still serves, what `make()` returns, which is then stored.

        A prefix of more than `limit` bytes is returned, but not stored. Raises `ValueError` for a key that cannot be
        one, and where nothing makes a prefix.
        """
        if not isinstance(key, Hashable):
            raise ValueError(f"key: expected a hashable value, such as a digest of the images, got {quoted(key)}")
        if not callable(make):
            raise ValueError(f"make: expected a function that returns a prefix, got {quoted(make)}; pass a lambda")
        with self._lock:
            found = self._held.get(key)
            if found is not None and found.serves:
                self._held.move_to_end(key)
                return found
        made = make()
        if not isinstance(made, Prefix):
            raise ValueError(f"make: expected what `flow.prefix` returns, got {quoted(made)}")
        with self._lock:
            self._held.pop(key, None)
            if made.nbytes <= self.limit:
                self._held[key] = made
            while sum(one.nbytes for one in self._held.values()) > self.limit:
                self._held.popitem(last=False)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes that the stored prefixes hold."""
        with self._lock:
            return sum(one.nbytes for one in self._held.values())

    def clear(self) -> None:
        """Let all of them go."""
        with self._lock:
            self._held.clear()

    def __len__(self) -> int:
        return len(self._held)


def make_prefix(flow: Flow, hooks: ModelHooks, tokens: int | None, inputs: dict[str, Any]) -> Prefix:
    """Run the model on one prompt up to the boundary, and keep what its prefix needs."""
    _check(flow, hooks, tokens, inputs)
    ids = inputs["input_ids"]
    keeping = Keeping(tokens, ids)
    model = hooks.backbone.model
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    name = next(name for name, own in hooks.flows.items() if own is flow)
    with torch.no_grad(), hooks.choosing(name), hooks.keeping.let(hooks, keeping), suppress(PrefixKept):
        model(**inputs, **{CACHE_ARGUMENT: cache, "use_cache": True})
    if keeping.found is None:
        raise UnsupportedCall("prefix: the model ran without its text decoder; pass the inputs of a whole prompt")
    return Prefix(flow, keeping.found, inputs, hooks.backbone.pixels_in(inputs), config)


def _check(flow: Flow, hooks: ModelHooks, tokens: int | None, inputs: dict[str, Any]) -> None:
    plan, ids = flow.plan, inputs.get("input_ids")
    _check_attached(flow)
    if hooks.backbone.text.training:
        raise UnsupportedCall(
            "prefix: the model is in `train()`, where dropout would differ from question to question; call `eval()` "
            "first"
        )
    if plan.idle:
        raise UnsupportedCall(f"prefix: the policy {plan.policy.name!r} has no stages, so nothing is attached")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        raise UnsupportedCall(
            "prefix: expected `input_ids` (1, tokens) of one prompt; make a prefix of each, and ask it many questions"
        )
    _, mask = _tokens_in(inputs, "one prompt")
    if mask is not None and not bool(mask.bool().all()):
        raise UnsupportedCall("prefix: the prompt has padding; pass it alone and without padding")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool)):
        raise UnsupportedCall(
            f"prefix: expected `tokens` as a whole number, got {quoted(tokens)}; leave it out to end with the last "
            "image"
        )
    if not hooks.backbone.has_images(inputs):
        raise UnsupportedCall("prefix: the prompt brings no image; a prefix ends with the last visual token")
    given = [name for name in _OF_CALLS if inputs.get(name) is not None]
    if given:
        raise UnsupportedCall(
            f"{given[0]}: not for a prefix, which runs a fresh prompt as its processor gives it; leave it out"
        )
    if hooks.backbone.bidirectional == "prompt":
        raise UnsupportedModel(
            "prefix: in this model tokens of images see the whole prompt, its question included, so that their states "
            "differ from question to question; ask with the whole prompt instead"
        )


def _check_attached(flow: Flow) -> None:
    if not flow.attached:
        raise UnsupportedCall(
            f"prefix: its policy {flow.policy.name!r} is no longer attached; attach it and make the prefix again"
        )


def _tokens_in(inputs: Mapping[str, Any], what: str) -> tuple[Tensor, Tensor | None]:
    """`input_ids` and `attention_mask`; raises `UnsupportedCall` where they are not of this form."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        got = f"a tensor {tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UnsupportedCall(f"prefix: expected `input_ids` (batch, tokens) of {what}, got {got}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        got = f"a tensor {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedCall(f"prefix: expected `attention_mask` {tuple(ids.shape)}, as `input_ids`, got {got}")
    return ids, mask


def _repeated(value: Any, times: int) -> Any:
    """A value per image of one sample, for so many samples."""
    return value.repeat(times, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value

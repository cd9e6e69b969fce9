"""Calls that begin with a prefix: how they are recognised, and what is refused of them before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import StaticCache

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.model.arguments import cache_in
from dropflow.engine.tokens.ahead import (
    Ahead,
    ahead_in,
    begins_at,
    begun_with,
    first_places,
    hand_over,
    placed,
    uncounted_in,
)
from dropflow.engine.tokens.cache import first_held, seen_by
from dropflow.engine.tokens.host import read
from dropflow.engine.tokens.prompt import VisualTokens, valid_tokens
from dropflow.errors import UnsupportedCall

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.engine.decoder.site import Site


def begun_as_asked(original: Callable[..., Any]) -> Callable[..., Any]:
    """The method with which `generate` prepares its cache, so that a static one that is asked for begins with a prefix.

    The method alone refuses to be asked for a kind of cache while it is given one.
    """

    @wraps(original)
    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        asked, begun = generation_config.cache_implementation, model_kwargs.get(CACHE_ARGUMENT)
        if asked is None or begun_with(begun) is None:
            return original(generation_config, model_kwargs, *args, **kwargs)
        if ahead_in(begun) is None:
            _refuse_again()
        del model_kwargs[CACHE_ARGUMENT]
        prepared = original(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE_ARGUMENT)
        if not isinstance(made, StaticCache) or made.offloading:
            raise UnsupportedCall(
                f"cache_implementation: {asked!r} cannot begin with a prefix, whose entries all questions share; use "
                "'static', or leave it out"
            )
        hand_over(begun, made)
        return prepared

    return prepare


def begun_ahead(
    backbone: Backbone, arguments: dict[str, Any], labels: object, replayed: object
) -> tuple[Ahead, Tensor] | None:
    """The prefix with which a call of the core begins, and where it does in each sample; `None` for other calls.

    `labels` are those of the call and `replayed` the keeps that the caller states for it, if any. Raises
    `UnsupportedCall` for a call that does not begin with it, that brings more than text after it, or asks for what it
    cannot give.
    """
    cache = cache_in(arguments)[1]
    ahead = ahead_in(cache)
    if ahead is None:
        _check_unused(cache, arguments)
        return None
    pixels = sorted(backbone.pixels_in(arguments)) or [name for name in ("mm_encoder_outputs",) if arguments.get(name)]
    if pixels:
        raise UnsupportedCall(
            f"{pixels[0]}: the prefix from which the cache was made holds its images already, and a question cannot "
            "bring more; leave it out, as `Prefix.inputs` does, or ask with the whole prompt and a fresh cache"
        )
    _check_asked(ahead, arguments, labels, replayed)
    ids = arguments.get("input_ids")
    if ids is None:
        raise UnsupportedCall(
            f"{CACHE_ARGUMENT}: made from a prefix, so the call must state `input_ids`, which tell that it begins with "
            "it; pass them instead of `inputs_embeds`"
        )
    valid = valid_tokens(arguments.get("attention_mask"), ids.shape[0], ids.shape[1], ids.device, 0)
    return ahead, begins_at(ahead, ids, valid, backbone.placeholders(ids))


def _check_unused(cache: Any, arguments: dict[str, Any]) -> None:
    """Refuse to begin with a prefix a second time; one host synchronisation for a long call on such a cache."""
    begun, ids = begun_with(cache), arguments.get("input_ids")
    if begun is None or ids is None or ids.shape[1] <= len(begun):
        return
    batch, tokens = ids.shape
    valid = valid_tokens(arguments.get("attention_mask"), batch, tokens, ids.device)
    _, place = first_places(valid, len(begun))
    if bool((ids.gather(1, place) == begun.to(ids.device)).all(1).any()):
        _refuse_again()


def _refuse_again() -> NoReturn:
    raise UnsupportedCall(
        f"{CACHE_ARGUMENT}: a call has begun with this cache of a prefix already, even if it failed, and these are "
        "whole prompts again; call `Prefix.inputs` anew for every call of the model or of `generate`"
    )


def _check_asked(ahead: Ahead, arguments: dict[str, Any], labels: object, replayed: object) -> None:
    """Refuse what a call that begins with a prefix cannot give."""
    if arguments.get("use_cache") is False:
        raise UnsupportedCall(
            "use_cache: false, but a prefix rides on the cache, which every later step must continue; leave it out, or "
            f"ask with the whole prompt and no {CACHE_ARGUMENT}"
        )
    if labels is not None and ahead.hidden is None:
        raise UnsupportedCall(
            "labels: the policy decides nothing in the LLM, so the prefix has no states after the last layer, from "
            "which the first label is predicted; ask with the whole prompt, or compute the loss from the logits"
        )
    if replayed is not None:
        raise UnsupportedCall(
            "replay: keeps are replayed over whole prompts, and this call begins with a prefix; pass the whole prompt "
            "and a fresh cache"
        )


def visual_ahead(ahead: Ahead, first: Tensor, arguments: dict[str, Any]) -> VisualTokens:
    """The visual tokens of a call that begins with a prefix, at the tokens `first` of its samples."""
    return VisualTokens(placed(ahead.prompt.visual, first, arguments["input_ids"].shape[1], False), {})


def check_begun(
    begun: tuple[Ahead, Tensor], arguments: dict[str, Any], site: Site, cache: Any, *, padded: bool
) -> dict[str, Any]:
    """The arguments of a call of the decoder with the positions that its tokens have without padding before them.

    Where those of a `padded` call count that padding, the cache notes it for later calls (`counted_later`). Refuses
    other positions of the prefix than where it was made, and training.
    """
    ahead, first = begun
    if site.training:
        raise UnsupportedCall(
            f"{CACHE_ARGUMENT}: made from a prefix, through which no gradients flow; train on whole prompts"
        )
    if not _counts_padding(arguments.get("position_ids"), ahead, first) or not padded:
        return arguments
    first_held(cache).uncounted = first
    return arguments | {"position_ids": _less(torch.arange(arguments["inputs_embeds"].shape[1])[None], first)}


def _counts_padding(positions: Tensor | None, ahead: Ahead, first: Tensor) -> bool:
    """Whether the positions of a call that begins with a prefix count the padding before its samples.

    Raises `UnsupportedCall` where the prefix has other ones than where it was made. One host synchronisation where the
    call states positions.
    """
    if positions is None:  # the decoder would count it
        return True
    made = torch.arange(ahead.tokens)[None] if ahead.positions is None else ahead.positions
    if positions.dim() == made.dim():
        if made.dim() == 3:  # of four planes the first has text positions, which a forward alone does not state
            positions, made = (one[-min(len(positions), len(made)) :] for one in (positions, made))
        tokens = first[:, None] + torch.arange(ahead.tokens, device=first.device)
        own = positions.expand(*positions.shape[:-2], len(first), -1)
        found = own.gather(-1, tokens.to(own.device).expand(*own.shape[:-1], -1))
        made, shift = made.to(own.device), first[:, None].to(own.device)
        ((same,), (shifted,)) = read((found == made).all(), (found == made + shift).all())
        if same or (shifted and made.dim() == 2):  # a core may count it, too
            return not same
    raise UnsupportedCall(
        "position_ids: the tokens of the prefix have others than where it was made; pass what `Prefix.inputs` "
        "returns, with sizes of images and no positions of your own"
    )


def counted_later(cache: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a later call of the decoder, without padding in its positions where the prefix has none in its.

    Positions that a caller states himself stay; only on such a cache, one host synchronisation where there are some.
    """
    uncounted = uncounted_in(cache)
    if uncounted is None:
        return arguments
    own, tokens = arguments.get("position_ids"), arguments["inputs_embeds"].shape[1]
    seen = seen_by(cache)
    counted = torch.arange(seen, seen + tokens)[None]
    if own is not None:
        if own.dim() != 2 or own.shape[1] != tokens:
            return arguments
        ((counts,),) = read((own == counted.to(own.device)).all())
        if not counts:
            return arguments
    return arguments | {"position_ids": _less(counted, uncounted)}


def _less(positions: Tensor, uncounted: Tensor) -> Tensor:
    """Positions without so many tokens of padding before each sample; those of the padding itself are 0."""
    return (positions.to(uncounted.device) - uncounted[:, None]).clamp(min=0)


def refuse_direct_prefix(decoder: str) -> NoReturn:
    """Refuse a direct call of the text decoder with a prefix's cache."""
    raise UnsupportedCall(
        f"{CACHE_ARGUMENT}: made from a prefix, and the {decoder} was called directly; call the model, which finds the "
        "prefix in its `input_ids`"
    )

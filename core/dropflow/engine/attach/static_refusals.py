"""Refuses prompts with images on a static cache, where its layers could not be fixed after the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.cache import is_static, limit_of, seen_by
from dropflow.errors import UnsupportedCall, UnsupportedModel

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.policy.plan import Plan


def check_static(backbone: Backbone, plan: Plan, cache: Any, tokens: int) -> None:
    """Refuse a static cache under a policy that changes what its layers hold after the prompt.

    Raises `UnsupportedModel` for that, and `UnsupportedCall` for a cache too small for `tokens` more.
    """
    if not is_static(cache):
        return
    why = None
    if plan.policy.recall:
        why = "later turns recall dropped tokens, for which its layers have no room"
    elif backbone.shape.producers:
        why = "layers of this model share keys, and each sees other entries of them"
    elif "flash" in backbone.text.config._attn_implementation:
        why = f"{backbone.text.config._attn_implementation} counts entries, and would count empty ones"
    for name, stage in plan.hooks.implementers("decode_cache"):
        if stage.decode_reads_at:
            why = f"stages.{name} chooses at every step what to read, which has another size each time"
        elif stage.decode_every:
            why = f"stages.{name} evicts entries while decoding"
    if why is not None:
        raise UnsupportedModel(
            f"{CACHE_ARGUMENT}: a static cache does not go with this policy and model: {why}; use transformers' "
            "DynamicCache (cache_implementation=None or 'dynamic')"
        )
    check_room(cache, tokens)
    missing = backbone.shape.holding[-1] + 1 - len(cache.layers)
    if missing > 0:
        raise UnsupportedModel(
            f"{CACHE_ARGUMENT}: a static cache of {len(cache.layers)} layers lacks {missing} of this model's; make it "
            "by StaticCache(config=model.config, max_cache_len=...)"
        )


def check_room(cache: Any, tokens: int) -> None:
    """Raise `UnsupportedCall` for a static cache too small for `tokens` more; one host synchronisation for such caches.

    Of other caches, nothing is asked.
    """
    if not is_static(cache):
        return
    limit, length = limit_of(cache), seen_by(cache) + tokens
    if limit is not None and length > limit:
        raise UnsupportedCall(
            f"{CACHE_ARGUMENT}: a static cache of {limit} tokens cannot hold {length}; make it with a larger "
            "max_cache_len"
        )

"""The methods of a model that encode images: what they do within a call, and when they are called alone."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial, wraps
from types import FrameType
from typing import Any

from dropflow.backbone.backbone import MODALITIES
from dropflow.engine.attach.call import Call
from dropflow.engine.attach.overlap import Beside, DeferredFeatures, Encoded, Promise
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.model.turns import inside_generate, inside_of, refuse_own_model
from dropflow.engine.vision.encoding import encode, joined
from dropflow.engine.vision.vision_run import VisionRun
from dropflow.errors import UnsupportedCall


class FeatureHooks:
    """Replaces a core's features methods, which then encode under the policy of this thread's call.

    A method that is called alone, as `generate` may do before the first forward, is a call of its own.
    """

    def __init__(
        self,
        mine: Callable[[], Call | None],
        open_call: Callable[[object, FrameType], Call | None],
        close: Callable[[object], None],
        beside: Beside | None,
    ) -> None:
        """`mine` returns this thread's call; `open_call` and `close` begin and end one, for its owner."""
        self._mine, self._open, self._close, self.beside = mine, open_call, close, beside

    def install(self, standing: Shadows, core: Any) -> None:
        """Lay the methods that `core` has in `standing`."""
        for modality in MODALITIES:
            name = f"get_{modality}_features"
            if hasattr(core, name):
                standing.lay(core.__dict__, name, self._features_method(core, modality))

    def _features_method(self, core: Any, modality: str) -> Any:
        name = f"get_{modality}_features"
        original = getattr(core, name)
        signature = inspect.signature(original)

        def run(args: tuple[Any, ...], kwargs: dict[str, Any], *, later: bool) -> Any:
            call = self._mine()
            if call is not None and (call.decoder is not None or (call.vision is not None and call.vision.asking)):
                refuse_own_model(name)
            if call is not None and (call.encoding or call.site is None):
                return original(*args, **kwargs)  # a model may encode videos with its method for images
            if call is None and inside_of(core):  # its forward has begun before the policy was attached
                return original(*args, **kwargs)
            alone = call is None
            if call is None:
                call = self._open(get_features, sys._getframe())
            try:
                if call is None or call.site is None:
                    return original(*args, **kwargs)
                if not kwargs.get("return_dict", True):
                    raise UnsupportedCall(f"{name}: return_dict=False is not supported under a policy; leave it out")
                given = signature.bind_partial(*args, **kwargs).arguments
                encoded = modality if alone else call.encodes(modality)
                features = partial(original, *args, **(kwargs | {"return_dict": True}))
                making = partial(_encoded, modality, encoded, features, given)
                if later and self.beside is not None:
                    if alone and inside_generate():
                        now = partial(run, args, kwargs, later=False)
                        return DeferredFeatures(making, now, call.site.plan.serial, given)
                    if not alone and call.serial is None:
                        return self.beside.stand_in(call, encoded, Promise(making, given))
                made = making(call)
                if alone:
                    return made.with_flags()
                call.losses += made.losses
                call.flags[encoded] = joined(made.flags)
                return made.output
            finally:
                if alone:
                    self._close(get_features)

        @wraps(original)
        def get_features(*args: Any, **kwargs: Any) -> Any:
            return run(args, kwargs, later=True)

        return get_features

    def take_promises(self, call: Call, encoded: Mapping[str, Any]) -> dict[str, Any]:
        """`encoded` with what `generate` has deferred: promised again in this call, or encoded now if they must be."""
        assert self.beside is not None
        assert call.site is not None
        found = dict(encoded)
        for modality, features in encoded.items():
            promise = features.promise(call.site.plan.serial) if isinstance(features, DeferredFeatures) else None
            if promise is None or promise.deferred is None:
                continue
            if call.serial is None:
                found[modality] = self.beside.stand_in(call, modality, promise)
            else:
                promise.deferred.fill(promise.encode(call).with_flags())
        return found


def _encoded(modality: str, encoded: str, features: Callable[[], Any], given: Mapping[str, Any], call: Call) -> Encoded:
    """Encode what `call` brings as `encoded` with `features`, the method of `modality`, whose arguments are `given`."""
    site = call.site
    assert site is not None
    call.encoding = True
    try:
        call.vision = VisionRun(site, modality, given, encoded) if site.plan.encode_at else None
        output, flags = encode(site, call.vision, encoded, features, given)
        return Encoded(output, flags, () if call.vision is None else tuple(call.vision.losses))
    finally:
        call.encoding, call.vision = False, None

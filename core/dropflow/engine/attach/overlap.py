"""Encoding beside the text layers (`attach(..., overlap=True)`): HiDrop's parallel decoupling (arXiv:2602.23699).

Under a policy with late injection the layers before boundary B run on text alone, so they need no features. How a call
goes, from top to bottom:

1. The core asks for features (`get_image_features`). It gets a stand-in of zeros with a row for every placeholder, and
   what would have encoded them is kept as a promise of the call. In `generate`, which encodes before the prefill, the
   promise is a `DeferredFeatures` that becomes one of the prefill's call.
2. The core puts the zeros in the places of the placeholders and calls the text decoder, before whose first layer one
   thread begins to keep the promises, in order; on a CUDA device it queues its work on a stream of its own.
3. The layers before B run on text rows, as ever. None of them reads a visual row.
4. At B (or where a stage asks how many visual tokens there are) the call waits for the thread and takes what it has
   made: features, flags, the prompt that follows from them, what the model adds after layers (deepstack).

The thread is a part of the call: it sees a `Call` of its own, which the hooks of the vision side find by the thread.
Where encoding cannot run beside the layers, it runs before them as without `overlap`, and `report.overlap` says why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from dropflow.engine.attach.call import Call
from dropflow.engine.decoder.awaited import Arrival, Awaited
from dropflow.engine.model.side_work import SideWork
from dropflow.engine.tokens.row_flags import RowFlags
from dropflow.engine.vision.encoding import Features, FlowFeatures, in_force, joined, refuse_detached, with_flags
from dropflow.errors import PolicyError, UnsupportedModel
from dropflow.lifecycle.instruction import stated_instruction

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.engine.decoder.site import Site
    from dropflow.engine.tokens.prompt import Prompt
    from dropflow.policy.plan import Plan


@dataclass(frozen=True)
class Encoded:
    """Features of one modality, with what the stages decided about them."""

    output: Any
    """What the model's own method returned, with a row for every placeholder."""
    flags: list[RowFlags]
    losses: tuple[Tensor, ...] = ()

    def with_flags(self) -> FlowFeatures:
        """The features in the form in which they travel between two calls."""
        return with_flags(self.output, self.flags, self.losses)


Encode = Callable[[Call], Encoded]
"""Encodes images for a call."""


@dataclass(frozen=True)
class Promise:
    """Features of one modality that are encoded later in the call."""

    encode: Encode
    given: Any
    """Arguments of the model's own method."""
    deferred: DeferredFeatures | None = None
    """Where the features came from, if `generate` asked for them before the call."""
    context: Context = field(default_factory=copy_context)
    """Context variables as they are where the features were asked for."""

    def keep(self, side: Call) -> Encoded:
        """Encode in the thread beside the call, in whose `side` the hooks work."""
        return self.context.run(self.encode, side)


class DeferredFeatures(FlowFeatures):
    """Features that `generate` has asked for before the prefill; encoded as soon as anybody reads them.

    The engine takes the promise out of them instead when the prefill begins, and fills them when it has been kept.
    """

    def __init__(self, encode: Encode, now: Callable[[], FlowFeatures], plan: int, given: Any) -> None:
        """`now` encodes outside any call; `plan` is `Plan.serial` of the policy, `given` what the method was given."""
        # no fields are set, since setting one would read others
        self.__dict__["deferred"] = (encode, now, plan, given)

    def promise(self, plan: int) -> Promise | None:
        """What encodes the features in a call under the policy of this serial; `None` if they have been encoded."""
        deferred = self.__dict__.get("deferred")
        if deferred is None:
            return None
        encode, _, own, given = deferred
        if own != plan:
            refuse_detached()
        return Promise(encode, given, self)

    def fill(self, features: FlowFeatures) -> None:
        """Become `features`."""
        self.__class__ = FlowFeatures
        self.__dict__.pop("deferred", None)
        for name, value in features.items():
            self[name] = value
        self.__dict__.update(features.__dict__)

    def _read(self) -> None:
        deferred = object.__getattribute__(self, "__dict__").get("deferred")
        if deferred is not None:
            _, now, plan, _ = deferred
            if not in_force(plan):
                refuse_detached()
            type(self).fill(self, now())

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in ("promise", "fill"):
            object.__getattribute__(self, "_read")()
        return FlowFeatures.__getattribute__(self, name)  # by now its class

    def __getitem__(self, key: Any) -> Any:
        self._read()
        return self[key]

    def __iter__(self) -> Any:
        self._read()
        return iter(self)

    def __len__(self) -> int:
        self._read()
        return len(self)

    def __contains__(self, key: object) -> bool:
        self._read()
        return key in self

    def __reduce__(self) -> Any:
        self._read()
        return self.__reduce__()


class Beside:
    """The thread that encodes beside the calls of one model, at most one at a time."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._running: weakref.ref[SideWork[dict[str, Encoded]]] | None = None
        """Held by the call and by the thread itself, so that nothing of a call outlives both."""

    def mine(self) -> Call | None:
        """The side of the call that this thread works for, if it is the thread that encodes."""
        work = None if self._running is None else self._running()
        if work is None or not work.mine:
            return None
        side: Call = work.holds
        return side

    def end(self) -> None:
        """Wait until no thread encodes any more, as after a call that was interrupted."""
        work = None if self._running is None else self._running()
        if work is not None:
            if work.mine:
                return
            work.end()
        self._running = None

    def stand_in(self, call: Call, modality: str, promise: Promise) -> Features:
        """Promise the features of a modality; return zeros of their form, a row for every placeholder."""
        assert call.visual is not None
        call.promised[modality] = promise
        backbone, like = self._backbone, call.visual.mask
        rows = torch.zeros(len(call.visual.places[modality]), backbone.feature_width, device=like.device)
        levels = [[rows] for _ in range(backbone.deepstack_levels)]
        return Features(
            pooler_output=rows if backbone.features_form == "tensor" else [rows],
            deepstack_features=levels or None,
        )

    def begin(
        self, call: Call, embeds: Tensor, residuals: tuple[tuple[Tensor, Tensor], ...], prompt: Callable[[], Prompt]
    ) -> Awaited:
        """Begin to keep the call's promises; `prompt` makes the prompt once `call.flags` are complete.

        `embeds` and `residuals` are those of the decoder's call, with stand-ins in the places of promised features.
        """
        promised = dict(call.promised)

        def keep() -> dict[str, Encoded]:
            return {name: promise.keep(side) for name, promise in promised.items()}

        side = Call(call.owner, call.flow, call.site, visual=call.visual, core_runs=True, encoding=True)
        work = SideWork(keep, side, embeds.device, [promise.given for promise in promised.values()])
        self._running, call.work = weakref.ref(work), work
        work.begin()

        def arrive() -> Arrival:
            made = work.result()
            for name, encoded in made.items():
                call.flags[name] = joined(encoded.flags)
                call.losses += encoded.losses
                call.features[name] = encoded.output["pooler_output"]
                deferred = promised[name].deferred
                if deferred is not None:
                    deferred.fill(encoded.with_flags())
            assert call.visual is not None
            places = {name: call.visual.places[name].to(embeds.device).unbind(1) for name in made}
            whole = prompt()  # refuses a number of rows that does not fit
            filled = embeds
            for name, encoded in made.items():
                filled = filled.index_put(places[name], _rows(encoded.output["pooler_output"]).to(embeds))
            return Arrival(whole, filled, _filled(residuals, made, places, embeds))

        return Awaited(arrive)


def told(call: Call, awaited: Awaited | None, entry: int) -> str:
    """How the images of a call are encoded, for the report; vision enters at boundary `entry`."""
    if awaited is None:
        return f"images encoded before the text layers: {call.serial or 'nothing was left to encode'}"
    if awaited.arrived or not entry:
        return "images encoded before the text layers: a stage asked for the number of visual tokens"
    return f"images encoded beside the text layers before boundary {entry}"


def own_features(pooled: Any, embeds_like: Tensor) -> Tensor:
    """Features as the core hands them on in its output: joined, in the dtype and on the device of the embeddings."""
    whole = pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))
    return whole.to(embeds_like.device, embeds_like.dtype)


def _rows(pooled: Any) -> Tensor:
    """Rows (rows, dim) of features, in order."""
    whole = pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))
    return whole.flatten(0, -2)


def _filled(
    residuals: tuple[tuple[Tensor, Tensor], ...],
    made: dict[str, Encoded],
    places: dict[str, tuple[Tensor, ...]],
    like: Tensor,
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Residuals with the rows of promised features in their places."""
    found = []
    for level, (where, rows) in enumerate(residuals):
        where = where.to(like.device)
        whole = rows.new_zeros(*where.shape, rows.shape[-1]).masked_scatter(where[:, :, None], rows)
        for name, encoded in made.items():
            own = _rows(encoded.output["deepstack_features"][level])
            whole = whole.to(own).index_put(places[name], own)
        found.append((where, whole[where]))
    return tuple(found)


def check_overlap(backbone: Backbone, plans: Iterable[Plan | None]) -> None:
    """Refuse `overlap` for a model, or for policies all, with which encoding can never run beside the text layers."""
    asked = [plan for plan in plans if plan is not None]
    if not any(map(_may_enter_late, asked)):
        names = ", ".join(repr(plan.policy.name) for plan in asked) or "no policy"
        raise PolicyError(
            f"overlap: under {names} vision takes part from the first layer on, so no layer runs on text alone; add a "
            "stage such as `hidrop/late-injection`, or leave `overlap` out"
        )
    if backbone.features_form is None:
        raise UnsupportedModel(
            f"overlap: the adapter {type(backbone).__name__} does not say that this model only puts features in the "
            "places of their placeholders (`Backbone.features_form`), so its text layers cannot begin without them; "
            "leave `overlap` out"
        )


def _may_enter_late(plan: Plan) -> bool:
    """Whether vision enters at a later boundary than 0, or at one that is not known before a call."""
    injecting = {name for name, _ in plan.hooks.implementers("inject")}
    entries = [forecast.entry for name, forecast in plan.forecasts.items() if name in injecting]
    return bool(entries) and (plan.window.entry != 0 or None in entries)


def serial_because(call: Call, site: Site, arranged: object, arguments: dict[str, Any]) -> str | None:
    """Why a call encodes before the decoder although `overlap` is on; `None` if it need not.

    `arranged` is what the caller has arranged for the call, if anything; `arguments` are those of the core.
    """
    model: Any = site.backbone.model
    devices = getattr(model, "hf_device_map", None) or {}
    reasons = {
        "vision takes part from the first layer on": not _may_enter_late(site.plan),  # as under others of its set
        "the model trains": site.training,
        "keeps are replayed, or a prefix is kept": arranged is not None,
        "a stage reads the questions as text": site.plan.reads_questions,
        "instruction tokens are stated": stated_instruction() is not None,
        "a tuple was asked for": not arguments.get("return_dict", getattr(model.config, "return_dict", True)),
        "a mode of torch is active in this thread, such as a counter of FLOPs": torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0,
        "the model is compiled": callable(get_eval_frame_callback()),
        "several processes run the model": torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1,
        "the model is spread over devices": len(set(devices.values())) > 1,
        "some images have no placeholders": call.visual is None
        or not set(site.backbone.modalities_in(arguments)) <= call.visual.places.keys(),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)

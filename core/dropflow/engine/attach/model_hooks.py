"""Serves every forward of one model under a plan: the hooks that carry a call from its first module to its last."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from dropflow.backbone.backbone import MODALITIES
from dropflow.backbone.wrapped import check_called, forget_compiled
from dropflow.engine.attach import refusals
from dropflow.engine.attach.call import Call, CallLock
from dropflow.engine.decoder.head import full_logits, live_states, loss_of, shifted
from dropflow.engine.decoder.record import CallRecord
from dropflow.engine.decoder.run import Run
from dropflow.engine.model.stand_in import StandIn
from dropflow.engine.tokens.cache import is_flow_cache, serving
from dropflow.engine.tokens.prompt import instruction_tokens, join_flags, make_prompt, valid_tokens
from dropflow.engine.vision.vision import Vision, take_flags, with_flags
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.lifecycle.questions import questions_of

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.policy.plan import Plan

_encoding: ContextVar[bool] = ContextVar("dropflow_encoding", default=False)
"""True while a wrapped features method runs, in this thread."""


class ModelHooks:
    """Hooks on model, core and text decoder; installed on creation, gone after `remove`."""

    def __init__(self, backbone: Backbone, plan: Plan) -> None:
        self._backbone, self._plan = backbone, plan
        self._lock = CallLock()
        self._layers = StandIn(backbone.text)
        self._vision = Vision(plan, backbone)
        self._run: Run | None = None
        self._undo: list[Callable[[], None]] = []
        self.stated = threading.local()
        """Its `visual` holds the visual tokens a caller states for the calls of this thread."""
        self.flow: object = None
        """What attached this service: alive as long as the hooks are, whoever else holds it."""
        self.record: CallRecord | None = None
        """What happened in the last prefill that brought images."""
        if not plan.idle:
            self._install()

    def remove(self) -> None:
        """Take every hook off the model; harmless when done before."""
        while self._undo:
            self._undo.pop()()
        self.flow = None
        self._close()

    def _install(self) -> None:
        forget_compiled(self._backbone.text.layers)
        model, core, text = self._backbone.model, self._backbone.core, self._backbone.text
        hooked = [
            (core, self._before_core, self._after_core),
            (text, self._before_text, self._after_text),
        ]
        if model is not core:  # a core may be attached without its head
            hooked.append((model, self._before_model, self._after_model))
        for module, before, after in hooked:
            handles = (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True, always_call=True),
            )
            self._undo += [handle.remove for handle in handles]
        for modality in MODALITIES:
            if hasattr(core, f"get_{modality}_features"):
                self._wrap_features(core, modality)

    def _wrap_features(self, core: Any, modality: str) -> None:
        name = f"get_{modality}_features"
        original = getattr(core, name)
        signature = inspect.signature(original)

        @wraps(original)
        def get_features(*args: Any, **kwargs: Any) -> Any:
            if _encoding.get():  # a model may encode videos by its method for images
                return original(*args, **kwargs)
            if not kwargs.get("return_dict", True):
                raise UnsupportedCall(f"{name}: return_dict=False is not supported under a policy; leave it out")
            token = _encoding.set(True)
            try:
                given = signature.bind_partial(*args, **kwargs).arguments
                output, flags = self._vision.encode(
                    modality, lambda: original(*args, **(kwargs | {"return_dict": True})), given
                )
            finally:
                _encoding.reset(token)
            call = self._lock.mine()
            if call is None:
                return with_flags(output, flags)
            call.flags[modality] = torch.cat(flags)
            return output

        setattr(core, name, get_features)
        self._undo.append(lambda: core.__dict__.pop(name, None))

    # Hooks of the model: labels and loss

    def _before_model(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_owner(model, self._backbone.model)
        args, kwargs = _named(model, args, kwargs)
        call = self._open(model)
        keep = kwargs.get("logits_to_keep", 0)
        call.labels, call.logits_to_keep = kwargs.get("labels"), keep if isinstance(keep, int) else 0
        brings = self._brings_images(kwargs)
        refusals.check_call(self._backbone, self._plan, kwargs, brings)
        if call.labels is not None and brings and isinstance(keep, int) and keep == 0 and "shift_labels" not in kwargs:
            own = inspect.signature(model.forward).parameters
            call.loss = {"labels": call.labels, **{k: v for k, v in kwargs.items() if k not in own}}
            kwargs = kwargs | {"labels": None}
        return args, kwargs

    def _after_model(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG002
        call = self._lock.mine()
        try:
            if call is None or call.loss is None or output is None:
                return output
            logits = output[0]
            if call.live_rows is None:  # nothing was dropped: the loss as the model itself computes it
                loss = model.loss_function(logits=logits, vocab_size=logits.shape[-1], **call.loss)
            else:
                loss = loss_of(model, logits, call.live_rows, call.loss)
                logits = logits if model.training else full_logits(logits, call.live_rows)
            if isinstance(output, tuple):
                return (loss, logits, *output[1:])
            output["logits"] = logits
            return type(output)(**{**output, "loss": loss})
        finally:
            self._close()

    # Hooks of the core: images

    def _before_core(self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_owner(core, self._backbone.core)
        args, kwargs = _named(core, args, kwargs)
        call = self._lock.mine()
        if call is None or call.owner is core:
            check_called(self._backbone.model)
            call = self._open(core)
            refusals.check_call(self._backbone, self._plan, kwargs, self._brings_images(kwargs))
        call.attention_mask = kwargs.get("attention_mask")
        call.modalities, call.visual = self._visual_tokens(kwargs)
        if kwargs.get("mm_encoder_outputs"):
            plain, call.flags = take_flags(self._backbone, kwargs["mm_encoder_outputs"])
            kwargs = kwargs | {"mm_encoder_outputs": plain}
        return args, kwargs

    def _brings_images(self, kwargs: dict[str, Any]) -> bool:
        return self._stated(kwargs) is not None or self._backbone.has_images(kwargs)

    def _visual_tokens(self, kwargs: dict[str, Any]) -> tuple[Mapping[str, Tensor], Tensor | None]:
        stated = self._stated(kwargs)
        if stated is not None:
            return {}, stated
        backbone, ids = self._backbone, kwargs.get("input_ids")
        embeds: Any = kwargs.get("inputs_embeds")
        brings = backbone.modalities_in(kwargs)
        if brings:
            masks = {
                name: backbone.embedded_placeholders(embeds, name) if ids is None else backbone.placeholders(ids, name)
                for name in sorted(brings)
            }
            visual = torch.stack(list(masks.values())).any(0)
            return masks, visual if bool(visual.any()) else None
        if ids is not None:
            refusals.check_placeholders(backbone, ids, kwargs.get("past_key_values"))
        return {}, None

    def _after_core(self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG002
        call = self._lock.mine()
        if call is not None and call.owner is core:
            self._close()
        return output

    # Hooks of the text decoder: layers

    def _before_text(self, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._lock.mine()
        if call is None:
            return args, kwargs
        args, kwargs = _named(text, args, kwargs)
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        if call.visual is None and not is_flow_cache(cache):
            return args, kwargs  # nothing to restrict, nothing to fit: the model runs as it is
        if embeds is None:
            embeds = self._backbone.text.get_input_embeddings()(kwargs["input_ids"])
            kwargs = kwargs | {"inputs_embeds": embeds, "input_ids": None}
        refusals.check_positions(self._plan, kwargs.get("position_ids"))
        prompt = None
        added: tuple[tuple[Tensor, Tensor], ...] = ()
        if call.visual is not None:
            batch, tokens = embeds.shape[:2]
            valid = valid_tokens(call.attention_mask, batch, tokens, embeds.device)
            instruction = instruction_tokens(valid, call.labels, call.logits_to_keep)
            fixed = self._backbone.tokens_per_image
            flags = join_flags(call.modalities, call.flags)
            refusals.check_encoded(self._plan, flags)
            prompt = make_prompt(call.visual.to(embeds.device), flags, valid, instruction, fixed)
            if self._plan.reads_questions:
                prompt = replace(prompt, questions=questions_of(batch))
            kwargs, added = self._backbone.deepstack_residuals(kwargs)
        step = 0 if prompt is not None else _generated(cache)
        self._run = Run(self._plan, self._backbone, prompt, embeds, step, added)
        self._layers.install(self._run.layer)
        return args, kwargs

    def _after_text(self, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG002
        run, call = self._run, self._lock.mine()
        if run is None or call is None:
            return output
        self._stop()
        if output is None:  # the forward has raised
            return output
        self.record = run.record or self.record
        run.finish()
        hidden = output[0]
        if call.loss is not None and not run.live.everything:
            wanted = (
                shifted(call.loss["labels"]) != -100
                if self._backbone.model.training
                else torch.ones_like(run.live_mask)
            )
            hidden, call.live_rows = live_states(hidden, run.live, wanted.to(hidden.device))
        else:
            hidden = run.live.expand(hidden)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    def _open(self, module: Any) -> Call:
        call = self._lock.open(module)
        self._stop()  # what a call that no hook saw the end of (a keyboard interrupt) has left
        serving.set(True)  # from here on: some cores build the masks themselves, in front of the text decoder
        return call

    def _stop(self) -> None:
        if self._run is not None:
            self._run = None
            self._layers.remove()

    def _close(self) -> None:
        self._stop()
        if self._lock.mine() is not None:
            serving.set(False)
        self._lock.close()

    def _check_owner(self, module: Any, own: Any) -> None:
        if module is not own:
            raise UnsupportedModel(
                f"{type(module).__name__}: a copy of the attached model is running (nn.DataParallel makes some); "
                "attach a policy to each copy, or use DistributedDataParallel"
            )

    def _stated(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Visual tokens that the caller states, where they are those of this call."""
        visual: Tensor | None = getattr(self.stated, "visual", None)
        if visual is None:
            return None
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        given: Any = kwargs.get("input_ids") if embeds is None else embeds
        return refusals.stated_tokens(visual, tuple(given.shape[:2]), continues=bool(cache and cache.get_seq_length()))

    def __reduce__(self) -> NoReturn:
        raise UnsupportedModel(
            f"a model with a policy attached cannot be copied or pickled ({self._plan.policy.name!r} is); detach first "
            "and attach to the copy. `save_pretrained` and `state_dict` work, and the config records the policy"
        )


def _generated(cache: Any) -> int:
    """Tokens appended since the last prompt was settled, this call's one included."""
    layer = cache.layers[0]
    return int(layer.length - layer.prompt + 1) if layer.index is not None else 0


def _named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments by their names, so that hooks find them."""
    if not args:
        return args, kwargs
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [p.name for p in parameters[: len(args)]]
    return (), dict(zip(names, args, strict=True)) | kwargs

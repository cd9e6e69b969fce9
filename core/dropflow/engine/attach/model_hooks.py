"""The hooks of one attached model: they carry each call from its first module to its last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from dropflow.backbone.compiling import is_exported
from dropflow.backbone.wrapped import check_called
from dropflow.engine.attach import refusals
from dropflow.engine.attach.begun_calls import (
    begun_ahead,
    begun_as_asked,
    counted_later,
    refuse_direct_prefix,
    visual_ahead,
)
from dropflow.engine.attach.call import Call
from dropflow.engine.attach.feature_hooks import FeatureHooks
from dropflow.engine.attach.labelled_logits import LabelledLoss, check_loss_call
from dropflow.engine.attach.overlap import Beside, own_features, serial_because
from dropflow.engine.attach.recall_refusals import check_recall
from dropflow.engine.attach.stage_losses import share_of_step, summed, with_losses
from dropflow.engine.attach.stage_modules import StageModules
from dropflow.engine.attach.stage_weights import saving
from dropflow.engine.attach.stated import Stated, stated_tokens
from dropflow.engine.attach.static_refusals import check_room
from dropflow.engine.attach.text_calls import Asked, begin_prompt, recalled, recorded
from dropflow.engine.attach.tower_hooks import TowerHooks
from dropflow.engine.decoder.continued_run import ContinuedRun
from dropflow.engine.decoder.head import live_states, shifted
from dropflow.engine.decoder.keeps import Keeps
from dropflow.engine.decoder.parked import parked_in
from dropflow.engine.decoder.prefix_runs import Keeping
from dropflow.engine.decoder.prompt_run import PromptRun
from dropflow.engine.decoder.recalled_run import RecalledRun
from dropflow.engine.decoder.site import Site
from dropflow.engine.model import traced_step
from dropflow.engine.model.arguments import cache_after, cache_in, named
from dropflow.engine.model.attention import HeadShards
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.model.stand_in import Run, stand_in
from dropflow.engine.model.traced_step import TracedPolicy, TracedStep
from dropflow.engine.model.turns import Turn, Turns, calling_frame, inside_of, refuse_own_model
from dropflow.engine.tokens.ahead import ahead_in, uncounted_in
from dropflow.engine.tokens.cache import (
    check_written_by,
    fix_static,
    is_flow_cache,
    is_static,
    loosen_static,
)
from dropflow.engine.tokens.cache_layers import serving
from dropflow.engine.tokens.prompt import VisualTokens
from dropflow.engine.vision.encoding import FlowFeatures, take_flags
from dropflow.errors import UnsupportedCall, UnsupportedModel

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.engine.attach.flow import Flow, FlowSet


class ModelHooks:
    """Hooks on the model, core and text decoder, and replacements of their attributes, all undone by `remove`.

    They are inert until `flows` is set, and again as soon as it is cleared. So wherever attaching or detaching is
    interrupted, whatever remains on the model has no effect, and the next attach or detach cleans it up.
    """

    def __init__(
        self,
        backbone: Backbone,
        turns: Turns,
        shards: HeadShards | None,
        modules: StageModules,
        *,
        labelled_only: bool = False,
        overlap: bool = False,
    ) -> None:
        """With `labelled_only`, training forwards with labels compute no logits but those that predict a label.

        With `overlap`, images are encoded beside the layers before vision enters.
        """
        self.backbone, self._turns, self._shards, self.modules = backbone, turns, shards, modules
        self._model, self._core = backbone.model, backbone.core
        self._standing, self._passing = Shadows(), Shadows()
        """Replacements in the model's objects: some last while the policy is attached, some only for part of a call."""
        self._handles: list[Any] = []
        self.beside = Beside(backbone) if overlap else None
        """The thread that encodes beside the first layers; `None` without `overlap`."""
        self._features = FeatureHooks(self._mine, self._open, self._close, self.beside)
        self._labelled = LabelledLoss(self._standing, self._live_rows) if labelled_only else None
        self.flows: Mapping[str, Flow | None] = {}
        """The policies to choose from, by name; `None` for dense. Empty while nothing is attached."""
        self._sites: Mapping[str, Site] = {}
        self.handle: Flow | FlowSet | None = None
        """What attaching returned; kept alive as long as the hooks, even if the caller drops it."""
        self._chosen: Stated[TracedPolicy] = Stated("dropflow_chosen")
        self.traced = TracedStep(getattr(backbone.text, "rotary_emb", None), self._chosen.innermost)
        """Decode steps in compiled code, and the names of the policies."""
        self.visual: Stated[Tensor | None] = Stated("dropflow_visual")
        """Visual tokens that a caller states for its thread's calls."""
        self.replayed: Stated[Sequence[Keeps] | None] = Stated("dropflow_replayed")
        """Keeps that a caller states for its thread's prompts."""
        self.keeping: Stated[Keeping | None] = Stated("dropflow_keeping")
        """Asks that the next forward of a thread makes a prefix."""
        self._prefill: Stated[object | None] = Stated("dropflow_prefill")
        """Identifies the `generate` prefill that a thread is in."""

    # Attaching and detaching; the caller holds a turn

    def install(self, flows: Mapping[str, Flow | None], default: str) -> None:
        """Install the hooks and replacements on the model, then activate the flows."""
        self.remove()
        self.traced.serve(flows, default)
        if all(flow is None or flow.plan.idle for flow in flows.values()):  # nothing can change anything
            self.flows = dict(flows)
            return
        model, core, text = self._model, self._core, self.backbone.text
        hooked = [(core, self._before_core, self._after_core), (text, self._before_text, self._after_text)]
        if model is not core:  # a core may be attached without its head
            hooked.append((model, self._before_model, self._after_model))
        for module, before, after in hooked:
            before = partial(traced_step.before, before, self.traced, module is text)
            after = partial(traced_step.after, after, self.traced, module is text)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        # after the hooks, which alone keep this object: an interrupted attach must find what it has replaced
        self.modules.lay(self._standing, model)
        if self.modules.stages and hasattr(model, "save_pretrained"):
            save = saving(model.save_pretrained, self.modules, self._passing, model)
            self._standing.lay(model.__dict__, "save_pretrained", save)
        plans = [flow.plan for flow in flows.values() if flow is not None]
        stand_in(self._standing, text, self._decoder_run, traced=self.traced)
        TowerHooks(self.backbone, self._mine).install(self._standing, self._handles, plans)
        if hasattr(model, "_prefill"):  # part of transformers' `generate`, which may feed a prompt in chunks
            self._standing.lay(model.__dict__, "_prefill", self._prefilling(model._prefill))
        if hasattr(model, "_prepare_cache_for_generation"):
            prepare = begun_as_asked(model._prepare_cache_for_generation)
            self._standing.lay(model.__dict__, "_prepare_cache_for_generation", prepare)
        self._features.install(self._standing, core)
        self._sites = {
            name: Site(flow.plan, self.backbone, self._passing, self._shards, flow.trained)
            for name, flow in flows.items()
            if flow is not None and not flow.plan.idle
        }
        self.flows = dict(flows)

    def remove(self) -> None:
        """Remove everything from the model; does nothing if already removed, and is safe to interrupt and repeat."""
        self.flows = {}
        self.traced.open = self.traced.runs = False
        if self.beside is not None:
            self.beside.end()
        self._passing.lift_all()
        self._standing.lift_all()
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    # Turns and calls

    def choosing(self, name: str) -> AbstractContextManager[None]:
        """A block in which this thread's calls run under the policy of this name."""
        return self._chosen.let(self, self.traced.policies[name])

    def _open(self, owner: object, frame: FrameType) -> Call | None:
        """Begin a call once other threads' calls have ended; `None` if nothing is attached any more.

        First restores anything that an interrupted call has left replaced in the model's objects.
        """
        if self._mine() is not None:
            refuse_own_model(type(owner).__name__)
        turn = self._turns.take(frame)
        if self.beside is not None:
            self.beside.end()
        self._passing.lift_all()
        if not self.flows:
            turn.end()
            return None
        chosen = self._chosen.of(self, self.traced.default)
        site = self._sites.get(chosen.name)
        turn.call = call = Call(owner, self.flows[chosen.name], site, chosen)
        if site is not None:
            call.outer = serving.get()
            serving.set(_while(turn))  # set this early because some cores build the masks before the text decoder runs
        return call

    def _mine(self) -> Call | None:
        """The call of this thread; `None` outside a call. Of a thread that encodes beside a call, its side of it."""
        side = None if self.beside is None else self.beside.mine()
        if side is not None:
            return side
        turn = self._turns.mine()
        return None if turn is None else turn.call

    def _close(self, owner: object) -> None:
        """End the call that `owner` opened, if it opened one."""
        turn = self._turns.mine()
        if turn is not None and turn.call is not None and turn.call.owner is owner:
            call = turn.call
            if call.flow is not None:
                call.flow.stage_loss = summed(call.losses) if call.loss is None else call.loss
            serving.set(call.outer)
            turn.end()

    def _decoder_run(self) -> Run | None:
        call = self._mine()
        return None if call is None else call.decoder

    # `generate`: which forwards are one prompt

    def _prefilling(self, original: Any) -> Any:
        @wraps(original)
        def prefill(*args: Any, **kwargs: Any) -> Any:
            with self._prefill.let(self, object()):
                return original(*args, **kwargs)

        return prefill

    def _look_at(self, cache: Any, seen: int | None = None) -> None:
        """Let every policy notice what became of a cache before a call uses it."""
        for flow in self.flows.values():
            if flow is not None:
                flow.begins(cache, seen)

    # Hooks of the model: labels and loss

    def _before_model(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_owner(model, self._model)
        args, kwargs = named(model, args, kwargs)
        call = self._open(model, calling_frame())
        if call is None or call.site is None:
            self._check_dense(call, kwargs)
            return args, kwargs
        call.labels, call.logits_to_keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        brings = self._brings_images(kwargs)
        self._check_call(call.site, kwargs, brings_images=brings)
        whole = "shift_labels" in kwargs or isinstance(call.logits_to_keep, Tensor) or call.logits_to_keep
        if self._labelled is not None and call.labels is not None and brings and model.training and not whole:
            call.labelled_only = True
            self._labelled.lay(model)
        return args, kwargs

    def _live_rows(self) -> Tensor | None:
        """`Call.live_rows` of this thread's call."""
        call = self._mine()
        return None if call is None else call.live_rows

    def _after_model(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG002
        if output is not None:  # a call that raised has already ended, and the open call may be another one
            output = self._with_losses(model, kwargs, output)
            self._close(model)
        return output

    def _with_losses(self, owner: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The output of the module that computes the loss, with the losses of the stages added to it."""
        call = self._mine()
        if call is None or call.owner is not owner or not call.losses or kwargs.get("labels") is None:
            return output
        total = summed(call.losses)
        assert total is not None
        call.loss = total * share_of_step(kwargs["labels"], kwargs)
        return with_losses(output, call.loss)

    def _check_call(self, site: Site, kwargs: dict[str, Any], *, brings_images: bool) -> None:
        """Refuse a call that cannot be served, before anything runs."""
        refusals.check_call(self.backbone, site.plan, kwargs, brings_images)
        if brings_images and site.training:
            self.modules.check_reduced()
            refusals.check_progress(site)

    # Hooks of the core: which tokens are visual

    def _before_core(self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_owner(core, self._core)
        args, kwargs = named(core, args, kwargs)
        call = self._mine()
        if call is None and core is not self._model and inside_of(self._model):
            return args, kwargs  # its forward has begun before the policy was attached
        if call is not None and call.core_runs:
            refuse_own_model(type(core).__name__)
        if call is None or call.owner is not self._model or call.owner is core:
            check_called(self._model)
            call = self._open(core, calling_frame())
            if call is not None and call.site is not None:
                # a core may have the head itself
                call.labels, call.logits_to_keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
                self._check_call(call.site, kwargs, brings_images=self._brings_images(kwargs))
        if call is None or call.site is None:
            self._check_dense(call, kwargs)
            return args, kwargs
        if call.labelled_only:
            check_loss_call(self._model)
        call.core_runs = True
        call.attention_mask = kwargs.get("attention_mask")
        call.ahead = begun_ahead(self.backbone, kwargs, call.labels, self.replayed.of(self, None))
        call.visual = self._visual_tokens(kwargs) if call.ahead is None else visual_ahead(*call.ahead, kwargs)
        if self.beside is not None:
            arranged = self.replayed.of(self, None) or self.keeping.of(self, None)
            call.serial = serial_because(call, call.site, arranged, kwargs)
        if kwargs.get("mm_encoder_outputs"):
            given = kwargs["mm_encoder_outputs"]
            if self.beside is not None:
                given = self._features.take_promises(call, given)
            for features in given.values():
                call.losses += features.losses if isinstance(features, FlowFeatures) else ()
            there = {name: features for name, features in given.items() if name not in call.promised}
            plain, call.flags = take_flags(call.site, there, kwargs)
            kwargs = kwargs | {"mm_encoder_outputs": given | plain}
        return args, kwargs

    def _after_core(self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG002
        call = self._mine()
        if output is not None and call is not None:
            call.core_runs = False
            for name, features in call.features.items():  # in the places of the zeros that the core has seen
                stand_in_rows = output.get(f"{name}_hidden_states")
                if stand_in_rows is not None:
                    output[f"{name}_hidden_states"] = own_features(features, stand_in_rows)
            output = self._with_losses(core, kwargs, output)
            self._close(core)
        return output

    def _check_dense(self, call: Call | None, kwargs: dict[str, Any]) -> None:
        """Refuse caches and features made under a policy in a call without one."""
        if call is not None:
            refusals.check_dense(kwargs)

    def _brings_images(self, kwargs: dict[str, Any]) -> bool:
        begins = ahead_in(cache_in(kwargs)[1]) is not None
        return begins or self._stated(kwargs) is not None or self.backbone.has_images(kwargs)

    def _visual_tokens(self, kwargs: dict[str, Any]) -> VisualTokens | None:
        stated = self._stated(kwargs)
        if stated is not None:
            return VisualTokens(stated, {}) if bool(stated.any()) else None
        backbone, ids = self.backbone, kwargs.get("input_ids")
        embeds: Any = kwargs.get("inputs_embeds")
        brings = backbone.modalities_in(kwargs)
        if brings:
            return VisualTokens.found(
                {
                    name: backbone.embedded_placeholders(embeds, name)
                    if ids is None
                    else backbone.placeholders(ids, name)
                    for name in sorted(brings)
                }
            )
        if ids is not None:
            refusals.check_placeholders(backbone, ids, cache_in(kwargs)[1])
        return None

    def _stated(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Visual tokens that the caller states, if they describe this call."""
        visual = self.visual.of(self, None)
        if visual is None:
            return None
        embeds, cache = kwargs.get("inputs_embeds"), cache_in(kwargs)[1]
        given: Any = kwargs.get("input_ids") if embeds is None else embeds
        return stated_tokens(visual, given, continues=bool(cache and cache.get_seq_length()))

    # Hooks of the text decoder: layers

    def _before_text(self, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = named(text, args, kwargs)
        call = self._mine()
        if call is None and inside_of(self._core):  # its forward has begun before the policy was attached, or
            self.traced.runs = self.traced.serves(args, kwargs)  # in compiled code, whose graph has broken since
            return args, kwargs
        if call is None:
            call = self._open_directly(text, kwargs)
        elif call.encoding or call.decoder is not None:
            refuse_own_model(type(text).__name__)
        if call is None or call.site is None:
            self._look_at(cache_in(kwargs)[1])
            return args, kwargs
        # in case the list was replaced after attaching
        stand_in(self._standing, text, self._decoder_run, traced=self.traced)
        site, (_, cache) = call.site, cache_in(kwargs)
        embeds = kwargs.get("inputs_embeds")
        call.forward = forward = recorded(call, kwargs, cache, self._prefill.of(self, None), self._look_at)
        check_written_by(cache, site.plan.identity, site.plan.policy.name)
        if call.visual is None and not is_flow_cache(cache):
            return args, kwargs  # nothing to restrict or adjust: the model runs unchanged
        if call.visual is not None or forward.tokens > 1:
            if call.visual is None:  # else it was asked before the images were encoded
                check_room(cache, forward.tokens)
            loosen_static(cache)
        if embeds is None:
            embeds = text.get_input_embeddings()(kwargs["input_ids"])
            kwargs = kwargs | {"inputs_embeds": embeds, "input_ids": None}
        kwargs = counted_later(cache, kwargs)
        refusals.check_positions(site.plan, kwargs.get("position_ids"))
        if "logits_to_keep" in kwargs:
            # some decoders cut their states to these tokens between two layers, and others hand them to every layer
            kwargs = kwargs | {"logits_to_keep": 0}
        if call.visual is None:
            parked = parked_in(cache) if site.plan.policy.recall and forward.part is not None else None
            if parked is not None:
                check_recall(site, parked, len(embeds), self.replayed.of(self, None))
                call.decoder = recalled(call, site, parked, embeds, cache, forward)
                return args, kwargs
            padded = forward.part if forward.stated else None
            call.decoder = ContinuedRun(site, embeds, cache, None if padded is None else padded.valid)
            return args, kwargs
        asked = Asked(self.replayed.of(self, None), self.keeping.of(self, None), self.beside)
        return args, begin_prompt(call, site, kwargs, embeds, cache, forward, asked)

    def _open_directly(self, text: Any, kwargs: dict[str, Any]) -> Call | None:
        """Begin a direct call of the decoder, which carries less information than a call of the core."""
        call = self._open(text, calling_frame())
        if call is None or call.site is None:
            self._check_dense(call, kwargs)
            return call
        call.attention_mask = kwargs.get("attention_mask")
        stated, (_, cache) = self._stated(kwargs), cache_in(kwargs)
        if ahead_in(cache) is not None:
            refuse_direct_prefix(type(text).__name__)
        if stated is not None or kwargs.get("input_ids") is not None:
            self._check_call(call.site, kwargs, brings_images=stated is not None)
            call.visual = self._visual_tokens(kwargs)
        elif not is_flow_cache(cache):
            refusals.refuse_direct_call(type(text).__name__)
        return call

    def _after_text(self, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG002
        call = self._mine()
        try:
            if output is None and call is not None and self.beside is not None:
                self.beside.end()  # what it makes is not wanted any more
            if call is None or call.forward is None or call.flow is None or output is None:
                return output
            run, forward = call.decoder, call.forward
            if run is not None:
                run.finish()
                # the keeps and the work of a recalled turn are not those of its prompt
                forward.part = None if isinstance(run, RecalledRun) else run.record or forward.part
                call.losses += run.losses if isinstance(run, PromptRun) else ()
                if isinstance(run, ContinuedRun) and run.reading is not None:
                    forward.read = {number: active.counts for number, active in run.reading.read.items()}
            forward.cache = cache_after(kwargs, output)
            if run is not None and call.site is not None and is_static(forward.cache):
                alike = call.site.traceable and uncounted_in(forward.cache) is None
                traced_by = call.chosen if alike else None
                fix_static(forward.cache, traced_by, compact=call.site.compact)
            call.flow.noted(forward)
            call.decoder = call.forward = None
            if run is None or run.whole or not isinstance(run, PromptRun):
                return output
            hidden = output[0]
            if call.labelled_only and call.labels is not None:
                wanted = shifted(call.labels) != -100
                hidden, call.live_rows = live_states(hidden, run.live, wanted.to(hidden.device))
            else:
                hidden = run.expanded(hidden)
            if isinstance(output, tuple):
                return (hidden, *output[1:])
            output["last_hidden_state"] = hidden
            return output
        finally:
            if output is not None:
                self._close(text)

    def _check_owner(self, module: Any, own: Any) -> None:
        if module is not own:
            raise UnsupportedModel(
                f"{type(module).__name__}: a copy of the attached model is running (nn.DataParallel makes copies); "
                "attach a policy to each copy, or use DistributedDataParallel"
            )
        if is_exported():
            raise UnsupportedCall(
                "torch.export: a policy decides at every call which tokens to drop, which an exported graph cannot "
                "express; export the model after detaching"
            )

    def __reduce__(self) -> NoReturn:
        names = ", ".join(repr(flow.policy.name) for flow in self.flows.values() if flow is not None)
        raise UnsupportedModel(
            f"a model with a policy attached cannot be copied or pickled ({names} is); detach first and attach to the "
            "copy. `save_pretrained` and `state_dict` work, and the config records the policy"
        )


def _while(turn: Turn) -> Any:
    return lambda: turn.mine

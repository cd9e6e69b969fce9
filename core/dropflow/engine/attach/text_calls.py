"""A call of the text decoder: what is recorded of it, and the run that it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dropflow.engine.attach import refusals
from dropflow.engine.attach.begun_calls import check_begun
from dropflow.engine.attach.call import Call
from dropflow.engine.attach.overlap import Beside, told
from dropflow.engine.attach.recall_refusals import check_more_images
from dropflow.engine.attach.stated import stated_instruction_tokens, stated_questions
from dropflow.engine.decoder.keeps import Keeps, Replayed
from dropflow.engine.decoder.parked import Parked, parked_in
from dropflow.engine.decoder.prefix_runs import BegunRun, Keeping, KeepingRun
from dropflow.engine.decoder.prompt_run import PromptRun
from dropflow.engine.decoder.recalled_run import RecalledRun
from dropflow.engine.decoder.record import CallRecord
from dropflow.engine.decoder.records import Forward
from dropflow.engine.decoder.site import Site
from dropflow.engine.model.turns import inside_generate
from dropflow.engine.tokens.ahead import spread
from dropflow.engine.tokens.cache import indices_of, seen_by
from dropflow.engine.tokens.prompt import Prompt, document_starts, instruction_tokens, make_prompt, valid_tokens

Looks = Callable[..., None]
"""Called with a cache and, if known on the host, the number of logical tokens it has seen."""


@dataclass(frozen=True)
class Asked:
    """What the caller asks of a prompt beside its arguments."""

    replayed: Sequence[Keeps] | None
    """Keeps that take the place of the stages' decisions."""
    keeping: Keeping | None
    """Where the prompt is to be kept as a prefix."""
    beside: Beside | None
    """The thread that encodes beside the first layers; `None` without `overlap`."""


def recorded(call: Call, kwargs: dict[str, Any], cache: Any, prefill: object | None, look: Looks) -> Forward:
    """What must be recorded of a call of the text decoder before it runs.

    `prefill` identifies the `generate` prefill that it is part of; `look` is told of its cache.
    """
    given: Any = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if given is None:  # the model refuses it
        return Forward(0, None)
    (batch, tokens), text, mask = given.shape[:2], call.visual is None, call.attention_mask
    forward = Forward(tokens, prefill)
    if forward.generating is None:
        if text and (tokens == 1 or inside_generate()):
            look(cache)
            return forward  # decodes, or verifies drafts
        keep = call.logits_to_keep
        if not text and isinstance(keep, int) and keep > 1 and inside_generate():
            forward.drafts = keep - 1
    assert call.site is not None
    forward.seen, forward.before = seen_by(cache), indices_of(cache, call.site.plan.shape)
    look(cache, forward.seen)
    forward.stated = isinstance(mask, Tensor) and mask.dim() == 2
    if forward.stated and mask.shape[1] >= forward.seen + tokens:
        forward.real = mask[:, : forward.seen].bool()
    if text:
        forward.part = CallRecord(valid_tokens(mask, batch, tokens, given.device, forward.seen))
    return forward


def begin_prompt(
    call: Call, site: Site, kwargs: dict[str, Any], embeds: Tensor, cache: Any, forward: Forward, asked: Asked
) -> dict[str, Any]:
    """Begin the run of a call of the decoder with visual tokens; returns the arguments of the decoder."""
    backbone, beside = site.backbone, asked.beside
    assert call.visual is not None
    held = parked_in(cache) if site.plan.policy.recall else None
    if held is not None:
        check_more_images(held, call.visual.mask)
    batch, tokens = embeds.shape[:2]
    valid = valid_tokens(call.attention_mask, batch, tokens, embeds.device, forward.seen)
    starts = None
    if call.attention_mask is None and cache is None:  # only in this case does transformers treat rows as packed
        starts = document_starts(kwargs.get("position_ids"))
        refusals.check_packed(backbone, site.implementation, starts)
    stated = stated_instruction_tokens(embeds, forward.seen)
    instruction = instruction_tokens(valid, call.labels, call.logits_to_keep, starts, stated)
    visual = replace(call.visual, mask=call.visual.mask.to(embeds.device))
    per_image = backbone.tokens_per_image

    def prompt_made() -> Prompt:
        if call.ahead is not None:
            return spread(*call.ahead, valid, instruction)
        flags = visual.rows(call.flags)
        refusals.check_encoded(site.plan, flags)
        return make_prompt(visual, flags, valid, instruction, per_image)

    later = beside is not None and bool(call.promised)
    prompt = make_prompt(visual, None, valid, instruction, per_image) if later else prompt_made()
    if site.plan.reads_questions:
        prompt = replace(prompt, questions=stated_questions(embeds))
    if call.ahead is not None:
        kwargs = check_begun(call.ahead, kwargs, site, cache, padded=prompt.extents["valid"].low < tokens)
        call.decoder = begun = BegunRun(site, *call.ahead, prompt, embeds, cache)
        return kwargs | {"inputs_embeds": begun.embeds}
    kwargs, residuals = backbone.deepstack_residuals(kwargs)
    keeping = asked.keeping
    if keeping is not None:
        call.decoder = KeepingRun(site, prompt, embeds, residuals, keeping, kwargs.get("position_ids"))
        return kwargs
    awaited = beside.begin(call, embeds, residuals, prompt_made) if beside is not None and later else None
    keeps = asked.replayed
    replayed = None if keeps is None else Replayed.of(keeps, prompt, site.plan.shape.layers)
    call.decoder = run = PromptRun(site, prompt, embeds, residuals, forward.real, replayed, awaited)
    if beside is not None and run.record is not None:
        run.record.overlap = told(call, awaited, run.window.entry)
    return kwargs


def recalled(call: Call, site: Site, parked: Parked, embeds: Tensor, cache: Any, forward: Forward) -> RecalledRun:
    """The run of a text-only call for which visual tokens of earlier turns are chosen anew."""
    assert forward.part is not None
    valid = forward.part.valid
    stated = stated_instruction_tokens(embeds, forward.seen)
    instruction = instruction_tokens(valid, call.labels, call.logits_to_keep, None, stated)
    questions = stated_questions(embeds) if site.plan.reads_questions else None
    return RecalledRun(site, parked, embeds, cache, valid, instruction, questions)

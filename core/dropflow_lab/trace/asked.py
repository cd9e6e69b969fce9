"""Runs the traced question under every policy, with a recorder after its stages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import dropflow
from dropflow import Policy
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.trace.build import traced_images, traced_run, traced_videos
from dropflow_lab.trace.recorder import NAME, Recorder, watched
from dropflow_lab.trace.schema import Trace, TracedPrompt, TracedRun

if TYPE_CHECKING:
    from PIL.Image import Image


def record(
    model: Any,
    processor: Any,
    pictures: Sequence[Image],
    question: str,
    policies: Sequence[Policy],
    max_new_tokens: int = 32,
) -> Trace:
    """Ask one question about all `pictures` under each of `policies`, decoding greedily, and trace every run.

    Raises as `record_inputs` does.
    """
    inputs = build_inputs(processor, [(pictures, question)]).to(model.device, model.dtype)
    with dropflow.questions([question]):
        trace = record_inputs(model, processor, inputs, policies, max_new_tokens)
    asked = {"question": question, "pictures": [fingerprint(picture) for picture in pictures]}
    return trace.model_copy(update={"prompt": trace.prompt.model_copy(update=asked)})


def record_inputs(
    model: Any, processor: Any, inputs: Any, policies: Sequence[Policy], max_new_tokens: int = 32
) -> Trace:
    """Trace ready inputs of one sample: `input_ids` and what goes with them; `processor` only decodes tokens.

    Raises `InputError` for inputs that cannot be traced, and what `dropflow.attach` raises.
    """
    done = [_record(model, processor, inputs, policy, max_new_tokens) for policy in policies]
    prompt, first = done[0]
    return Trace(
        model=model.config.model_type,
        depth=len(first.layers),
        prompt=prompt,
        runs=[run for _, run in done],
    )


def _record(
    model: Any, processor: Any, inputs: Any, policy: Policy, max_new_tokens: int
) -> tuple[TracedPrompt, TracedRun]:
    """The prompt, and one run."""
    tokens = inputs["input_ids"]
    if tokens.shape[0] != 1:
        raise InputError(f"trace: expected one sample, got a batch of {tokens.shape[0]}; trace them one by one")
    with torch.no_grad(), dropflow.attach(model, watched(policy)) as flow:
        out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        report = flow.report()
        recorder = dict(flow.plan.stages)[NAME]
    assert isinstance(recorder, Recorder)
    if [event.step for event in recorder.caches] != list(range(out.shape[1] - tokens.shape[1])):
        raise InputError(
            "trace: expected one prefill and then one call per token; leave chunks, drafts and `use_cache` off"
        )
    images = traced_images(recorder.boundaries[0], recorder.encoded)
    prompt = TracedPrompt(question="", tokens=tokens.shape[1], images=images, videos=traced_videos(recorder.encoded))
    new = out[0, tokens.shape[1] :].tolist()
    words = [processor.decode([token]) for token in new]
    answer = processor.decode(new, skip_special_tokens=True).strip()
    return prompt, traced_run(policy, report, recorder, images, list(zip(new, words, strict=True)), answer)


def fingerprint(picture: Image) -> str:
    """SHA-256 of a picture's size and RGB bytes."""
    rgb = picture.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()

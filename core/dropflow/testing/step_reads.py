"""What decode steps read under stages that choose it: recorded for the oracle, and replaced by everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dropflow.engine.attach.flow import Flow
from dropflow.lifecycle.cache_payloads import CacheSelect, StepCall
from dropflow.testing.case import BUDGET, NO_OP, Case, relative_error


def chooses(flow: Flow) -> bool:
    """Whether some stage chooses what decode steps read."""
    return any(stage.decode_reads_at for _, stage in flow.plan.stages)


@contextmanager
def reads(flow: Flow, tokens: int, samples: int) -> Iterator[list[Tensor]]:
    """Collects, for each decode step of one answer, the prompt's tokens that each layer reads, as the stages say.

    Boolean (layers, samples, tokens) each, for a prompt of `tokens`.
    """
    found: list[Tensor] = []
    hooks, layers = flow.plan.hooks, flow.plan.shape.layers
    decide, chosen = hooks.decode_cache, dict[int, Tensor]()  # for each stage (layers, samples, tokens)

    def note(call: Any, stage: Any) -> Any:
        answer = decide(call, stage)
        if not isinstance(call, StepCall):
            return answer
        if call.step > len(found):
            found.append(torch.ones(layers, samples, tokens, dtype=torch.bool))
            chosen.clear()
        wanted = chosen.setdefault(id(stage), torch.ones_like(found[-1]))
        if not isinstance(answer, CacheSelect):
            wanted[call.layer :] = True
        else:
            own = torch.zeros(samples, tokens + call.step, dtype=torch.bool)
            active = (answer.active | ~call.visual) & call.view.valid
            for sample, index in enumerate(call.view.index):
                own[sample, index[active[sample]]] = True
            wanted[call.layer if answer.from_layer is None else answer.from_layer :] = own[:, :tokens]
        found[-1] = torch.stack(list(chosen.values())).all(0)
        return answer

    with mock.patch.object(hooks, "decode_cache", note):
        yield found


@torch.no_grad()
def check_reading_everything(case: Case) -> None:
    """Check that steps which may read everything have the bits of a policy without the stages that choose.

    Models with sliding windows have other kinds of cache layers without a policy, and then only nearly the same logits.
    """
    left = case.padded_left()
    asked = {**BUDGET, "output_logits": True, "return_dict_in_generate": True}
    with left.attach() as flow:
        if not chooses(flow):
            return
        hooks, choosing = flow.plan.hooks, {name for name, stage in flow.plan.stages if stage.decode_reads_at}
        decide = hooks.decode_cache

        def everything(call: Any, stage: Any) -> Any:
            return CacheSelect(call.view.valid) if isinstance(call, StepCall) else decide(call, stage)

        with mock.patch.object(hooks, "decode_cache", everything):
            found = left.model.generate(**left.inputs, **asked)
    rest = {name: entry for name, entry in left.policy["stages"].items() if name not in choosing}
    other = replace(left, policy={**left.policy, "stages": rest})
    with other.attach():
        expected = other.model.generate(**other.inputs, **asked)
    text: Any = left.adapter(left.model).text
    slides = any(kind != "full_attention" for kind in getattr(text.config, "layer_types", None) or ())
    allowed = left.tiny.tolerance if slides else 0.0
    for step, (own, plain) in enumerate(zip(found.logits, expected.logits, strict=True)):
        error = 0.0 if torch.equal(own, plain) else relative_error(own, plain)
        if error > allowed:
            raise left.broken(
                NO_OP,
                f"step {step} reads everything, but its logits differ from those without the stage by {error:.1e}, "
                f"allowed {allowed:.0e}",
            )

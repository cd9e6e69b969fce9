"""Checks that a question that begins with a prefix is answered as if all of it had been asked anew."""

from __future__ import annotations

import torch

from dropflow.errors import UnsupportedModel
from dropflow.testing.case import MASK, Case, relative_error


@torch.no_grad()
def check_asking_again(case: Case) -> float:
    """The part of guarantee 2 that concerns prefixes: keeps and logits of several questions in one ragged batch.

    Prefixes may be refused only for a family that lets its images see the question, or whose adapter does not say what
    they see (`Backbone.bidirectional`); then nothing is checked. Returns the largest relative error.
    """
    left = case.padded_left()
    text = case.adapter(case.model).visual_ids.values()
    ids = {token for tokens in text for token in ([tokens] if isinstance(tokens, int) else tokens)}
    sample = max(range(len(case.samples)), key=lambda number: len(left.drawn[1][number]))
    row, pictures = left.inputs["input_ids"][sample, left.real[sample]].tolist(), left.drawn[1][sample]
    words = [token for token in row if token not in ids][-4:]
    with left.attach() as flow:
        try:
            prefix = flow.prefix(**left.tiny.collate([row], [pictures], "left"))
        except UnsupportedModel as refusal:
            if case.adapter.bidirectional == "images":
                raise case.broken(MASK, f"no question can begin with a prefix: {refusal}") from refusal
            return 0.0
        own = row[: prefix.tokens]
        rows = [own + words, own + words[:1], own + words[::-1] + words]
        inputs = left.tiny.collate(rows, [pictures] * len(rows), "left")
        anew, live = left.model(**inputs).logits, flow.live()
        again = left.model(**prefix.inputs(**inputs)).logits
        if not torch.equal(flow.live(), live):
            layer = int((flow.live() != live).any(2).any(1).nonzero()[0])
            raise case.broken(MASK, f"from layer {layer} on, a question that begins with a prefix keeps other tokens")
    after = inputs["attention_mask"].flip(1).cumsum(1).flip(1) <= torch.tensor([[len(one)] for one in rows]) - len(own)
    after &= inputs["attention_mask"].bool()
    error = relative_error(again[after], anew[after])
    if not error < case.tiny.tolerance:
        raise case.broken(
            MASK,
            f"logits of a question that begins with a prefix differ from those of the whole prompt by {error:.1e}, "
            f"allowed {case.tiny.tolerance:.0e}",
        )
    return error

"""Answers one batch of requests under one policy, telling each request its tokens as they come."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import dropflow
from dropflow.errors import UnsupportedCall
from dropflow_lab.serve.pieces import Pieces
from dropflow_lab.serve.prompt import Prompt, joined
from dropflow_lab.serve.reuse import Reuse
from dropflow_lab.serve.sampling import Sampler
from dropflow_lab.serve.waiting import Finished, Piece, Waiting


class Answering:
    """A model with attached policies that answers batches; all of one batch under one policy."""

    def __init__(self, model: Any, processor: Any, flows: dropflow.FlowSet, reuse: Reuse) -> None:
        """`flows` are those attached to the model."""
        self._model, self._flows, self._reuse = model, flows, reuse
        # of its own, because a tokenizer that another thread is encoding with cannot be used
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        ends = model.generation_config.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        pad = model.generation_config.pad_token_id
        spare = self._tokenizer.pad_token_id if pad is None else pad
        self._pad = next((token for token in (spare, *sorted(self._ends)) if token is not None), 0)

    @torch.no_grad()
    def answer(self, batch: Sequence[Waiting]) -> None:
        """Answer requests of one `kind`; returns when all have been told that they are finished.

        Whatever the model raises is passed on, and requests that have not been told `Finished` are not finished.
        """
        inputs = self._inputs([request.prompt for request in batch])
        (policy,) = {request.policy for request in batch}
        with dropflow.questions([request.prompt.question for request in batch]), self._flows.using(policy):
            prefix = self._reuse.shared(batch, lambda request: self._inputs([request.prompt]))
            if prefix is None or not self._begun(batch, prefix, inputs):
                self._generate(batch, inputs)

    def _begun(self, batch: Sequence[Waiting], prefix: dropflow.Prefix, inputs: dict[str, Any]) -> bool:
        """Answer requests that begin with a prefix; false if they do not fit it, which shows before a layer runs."""
        try:
            self._generate(batch, prefix.inputs(**inputs))
        except UnsupportedCall:
            if any(request.begun for request in batch):
                raise
            self._reuse.forget(batch)
            return False
        return True

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The inputs of a batch, where the model is."""
        return {
            name: value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor)
            else value
            for name, value in joined(prompts, self._pad).items()
        }

    def _generate(self, batch: Sequence[Waiting], inputs: dict[str, Any]) -> None:
        rows = _Rows(batch, self._ends, self._decode)
        sampled = any(request.choice.temperature > 0 for request in batch)
        self._model.generate(
            **inputs,
            do_sample=False,
            pad_token_id=self._pad,
            max_new_tokens=max(request.choice.tokens for request in batch),
            stopping_criteria=[rows],
            logits_processor=[Sampler([request.choice for request in batch])] if sampled else None,
        )
        rows.end()

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class _Rows:
    """A stopping criterion that hands every row's new token on, and ends rows one by one."""

    def __init__(self, batch: Sequence[Waiting], ends: frozenset[int], decode: Callable[[Sequence[int]], str]) -> None:
        self._rows = [_Row(request, ends, decode) for request in batch]

    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"], **_: Any
    ) -> Bool[Tensor, " batch"]:
        del scores
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.push(token)
        return torch.tensor([row.over for row in self._rows], device=input_ids.device)

    def end(self) -> None:
        """End the rows that something else has ended, such as a `max_time` in the model's generation config."""
        for row in self._rows:
            row.end("length")


class _Row:
    def __init__(self, request: Waiting, ends: frozenset[int], decode: Callable[[Sequence[int]], str]) -> None:
        self._request, self._ends = request, ends
        self._pieces = Pieces(decode, request.choice.stop)
        self._tokens = 0
        self.over = False

    def push(self, token: int) -> None:
        if self.over:  # the row is padded until the longest one is over
            return
        if self._request.cancelled:
            self.over = True
            return
        self._tokens += 1
        ended = token in self._ends
        text = "" if ended else self._pieces.push(token)
        if text:
            self._request.tell(Piece(text))
        if ended or self._pieces.stopped:
            self.end("stop")
        elif self._tokens == self._request.choice.tokens:
            self.end("length")

    def end(self, reason: Literal["stop", "length"]) -> None:
        if self.over:
            return
        self.over = True
        rest = self._pieces.end()
        if rest:
            self._request.tell(Piece(rest))
        self._request.tell(Finished("stop" if self._pieces.stopped else reason, self._tokens))

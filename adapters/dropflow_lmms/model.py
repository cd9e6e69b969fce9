"""The model that lmms-eval asks: any transformers model with an adapter, under a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track

from dropflow.errors import MissingPackage
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.prompts import Conversation
from dropflow_lmms.answering import Answer, Answering
from dropflow_lmms.arguments import read_arguments
from dropflow_lmms.documents import Document, grouped, pads
from dropflow_lmms.failing import ending_the_run

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from lmms_eval.utils import simple_parse_args_string
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lmms_eval":
        raise
    raise MissingPackage("dropflow_lmms.model needs lmms-eval: pip install 'dropflow[lmms]'") from None


class Dropflow(lmms):  # type: ignore[misc]  # lmms-eval is untyped
    """A chat model for lmms-eval; `Arguments` says what `--model_args` may hold."""

    is_simple = False

    def __init__(self, **given: Any) -> None:
        """Load the model and attach its policy."""
        super().__init__()
        with ending_the_run():
            arguments = read_arguments(given)
            self._batch = arguments.batch_size
            self._answering = Answering(arguments)
            self._device: torch.device = self._answering.model.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Dropflow:
        """Return the model for `--model_args` and lmms-eval's own options; called by lmms-eval.

        Raises `InputError` for what is given in both places, such as `device`.
        """
        with ending_the_run():
            own = simple_parse_args_string(arg_string)
            more = {name: value for name, value in (additional_config or {}).items() if value is not None}
            twice = sorted(own.keys() & more.keys())
            if twice:
                raise InputError(f"model_args: {twice[0]}: lmms-eval gives it already; write --{twice[0]} instead")
        return cls(**own, **more)

    @property
    def device(self) -> torch.device:
        """Where the model gets its inputs."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Documents that are answered together."""
        return self._batch

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer documents; lmms-eval's padding of ranks with fewer documents is neither run nor counted."""
        with ending_the_run():
            documents = self._documents(requests)
            found = iter(self._answers(documents, [one.first() for one in documents]))
            return ["" if pads(request) else _result(next(found)) for request in requests]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer documents in rounds, each with the messages that the task gives after the answers so far.

        A round is a prompt of its own: what it shows is encoded and pruned anew.
        """
        with ending_the_run():
            documents = self._documents(requests)
            left, messages = documents, [one.first() for one in documents]
            while left:
                for document, answer in zip(left, self._answers(left, messages), strict=True):
                    document.said.append(answer.text)
                rounds = [(document, document.next()) for document in left]
                left = [document for document, asked in rounds if asked is not None]
                messages = [asked for _, asked in rounds if asked is not None]
            found = iter(documents)
            return [[] if pads(request) else next(found).said for request in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: lmms-eval's tasks ask chat models, whose prompts are messages, to generate only."""
        with ending_the_run():
            raise InputError(
                f"loglikelihood: not supported, {len(requests)} requests: tasks give the messages of a chat, which the "
                "scoring of a continuation needs, with requests to generate only; choose a task that generates"
            )

    def clean(self) -> None:
        """Report what the documents of all ranks took, and free the model.

        lmms-eval calls it once on every rank, when all requests are answered.
        """
        with ending_the_run():
            totals = self._answering.totals.gathered()
            if totals.prefill.prompts:
                log_metrics(totals.seconds, totals.tokens, totals.tokens / totals.seconds, totals.metrics())
            if self._answering.flow is not None:
                self._answering.flow.detach()
            del self._answering
        super().clean()

    def _documents(self, requests: Sequence[Any]) -> list[Document]:
        return [Document(request.args, self.task_dict) for request in requests if not pads(request)]

    def _answers(self, documents: Sequence[Document], asked: Sequence[Conversation]) -> list[Answer]:
        """Answer one conversation of each document, in batches of equal generation settings."""
        batches = [
            (generation, places[start : start + self._batch])
            for generation, places in grouped(documents).items()
            for start in range(0, len(places), self._batch)
        ]
        found: dict[int, Answer] = {}
        for generation, places in track(batches, "dropflow: answers", disable=self.rank != 0):
            answers = self._answering.answer([asked[place] for place in places], generation)
            found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(documents))]


def _result(answer: Answer) -> Any:
    return GenerationResult(answer.text, TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.tokens))

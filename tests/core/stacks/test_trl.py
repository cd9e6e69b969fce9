"""TRL's trainers train under a policy: losses, metrics and gradients are those of the masked run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dropflow
from dropflow.errors import UnsupportedModel
from dropflow.testing import MaskedOracle
from dropflow_lab.digits.checkpoints.model import checkpoint_path, load
from dropflow_lab.digits.data.dataset import examples

trl = pytest.importorskip("trl", reason="`make test-trl` brings it")
datasets = pytest.importorskip("datasets")
OLDER = not hasattr(trl.trainer.utils, "add_fused_lm_head")
"""Whether this TRL calls the model of DPO and GRPO without labels."""
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

KEEP_ALL = {"name": "all", "stages": {"all": {"use": "control/keep-all"}}}
PYRAMID = {"name": "pyramid", "stages": {"p": {"use": "pyramiddrop/pyramid", "keep": {3: 0.5, 6: 0.25, 9: 0.1}}}}
HIDROP = "hidrop-digits"
UNTIMED = ("runtime", "per_second", "time", "flos", "epoch")


class StatingSFT(trl.SFTTrainer):  # type: ignore[misc]  # TRL leaves it untyped
    """States who asks before the trainer takes the labels out of the call."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with dropflow.instruction_tokens(labels=inputs["labels"]):
            return super().compute_loss(model, inputs, *args, **kwargs)


class StatingDPO(trl.DPOTrainer):  # type: ignore[misc]
    """States who asks for the model and its reference: the last token before both answers."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        answers = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with dropflow.instruction_tokens(labels=answers):
            return super().compute_loss(model, inputs, *args, **kwargs)


def rows(count: int = 8) -> Iterator[dict[str, Any]]:
    for example in islice(examples("train", count), count):
        yield {
            "images": [example.image],
            "prompt": [{"role": "user", "content": example.question}],
            "completion": [{"role": "assistant", "content": example.answer}],
            "chosen": [{"role": "assistant", "content": example.answer}],
            "rejected": [{"role": "assistant", "content": "no 1" if example.answer == "yes" else "yes"}],
        }


def data(*columns: str) -> Any:
    return datasets.Dataset.from_list([{name: row[name] for name in ("images", "prompt", *columns)} for row in rows()])


COMMON: Mapping[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Something that differs between answers."""
    return [float(sum(map(ord, one[0]["content"])) % 7) for one in completions]


def sft(model: Any, processor: Any, folder: Path, **more: Any) -> Any:
    own = {name: more.pop(name) for name in ("compute_loss_func",) if name in more}
    arguments = trl.SFTConfig(str(folder), max_length=None, **COMMON | more)
    made = StatingSFT if own or more.get("label_smoothing_factor") else trl.SFTTrainer
    return made(model, arguments, train_dataset=data("completion"), processing_class=processor, **own)


def dpo(model: Any, processor: Any, folder: Path, **more: Any) -> Any:
    arguments = trl.DPOConfig(str(folder), max_length=None, beta=0.1, **COMMON | more)
    made = StatingDPO if OLDER else trl.DPOTrainer
    return made(model, args=arguments, train_dataset=data("chosen", "rejected"), processing_class=processor)


def grpo(model: Any, processor: Any, folder: Path, **more: Any) -> Any:
    own = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 5, "temperature": 3.0,
        "beta": 0.1, "num_iterations": 2, "max_steps": 4,
    }  # fmt: skip
    arguments = trl.GRPOConfig(str(folder), **COMMON | own | more)
    return trl.GRPOTrainer(model, reward, arguments, train_dataset=data(), processing_class=processor)


Kind = Callable[..., Any]


class Run:
    """One training: what it logged, and which tokens were live in every forward of the model or its reference."""

    def __init__(self, kind: Kind, folder: Path, policy: Any = None, source: Run | None = None, **more: Any) -> None:
        """Under a `policy`, or, if `source` is given, with the answers of that run and its dropped tokens masked."""
        self.lives: list[Tensor] = []
        self.scored: list[Tensor] = []
        self.rollouts: list[tuple[Tensor, Tensor | None]] = []
        self._generated: list[tuple[Tensor, Tensor]] = []
        self._source, self._generating = source, False
        model, processor = load()
        model.config.use_cache = model.generation_config.use_cache = True
        with ExitStack() as attached:
            if policy is not None:
                flow = attached.enter_context(dropflow.attach(model, policy))
            trainer = kind(model, processor, folder, gradient_checkpointing=source is None, **more)
            self._watch(trainer.model, flow if policy is not None else None)
            reference = getattr(trainer, "ref_model", None)
            if reference is not None:
                own = None if policy is None else attached.enter_context(dropflow.attach(reference, policy))
                self._watch(reference, own)
            trainer.model.generate = self._generate_of(trainer.model.generate, flow if policy is not None else None)
            trainer.train()
        self.logs = [
            {name: value for name, value in row.items() if not any(part in name for part in UNTIMED)}
            for row in trainer.state.log_history
        ]

    def _watch(self, model: Any, flow: Any) -> None:
        oracle: list[MaskedOracle] = []

        def before(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            if self._source is not None and not self._generating:
                oracle.append(MaskedOracle(model, self._source.lives[len(self.lives)]))
                self.lives.append(self._source.lives[len(self.lives)])
                oracle[-1].__enter__()

        def after(_: Any, __: Any, kwargs: dict[str, Any], ___: Any) -> None:
            if oracle:
                oracle.pop().__exit__(None, None, None)
            elif flow is not None and not self._generating:
                self.lives.append(flow.live())
                self.scored.append(kwargs["input_ids"])

        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after, with_kwargs=True)

    def _generate_of(self, original: Any, flow: Any) -> Any:
        def generate(**arguments: Any) -> Tensor:
            if self._source is not None:
                tokens, dice = self._source._generated[len(self.rollouts)]
                torch.set_rng_state(dice)
                self.rollouts.append((tokens, None))
                return tokens
            self._generating = True
            tokens = original(**arguments)
            self._generating = False
            self._generated.append((tokens, torch.get_rng_state()))
            self.rollouts.append((arguments["input_ids"], None if flow is None else flow.live()))
            return tokens

        return generate


def assert_close(found: Run, expected: Run) -> None:
    assert [row.keys() for row in found.logs] == [row.keys() for row in expected.logs]
    for row, own in zip(found.logs, expected.logs, strict=True):
        for name, value in own.items():
            assert row[name] == pytest.approx(value, rel=1e-5 if "loss" in name else 1e-4, abs=1e-6), (name, row, own)

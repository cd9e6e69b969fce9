"""TRL's trainers train under a policy: losses, metrics and gradients are those of the masked run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from documents import blocks
from torch import Tensor

import dropflow
from dropflow.errors import UnsupportedModel
from dropflow.testing import MaskedOracle
from dropflow_lab.digits.checkpoints.model import load
from dropflow_lab.digits.data.dataset import examples
from dropflow_lab.digits.data.questions import VOCABULARY

trl = pytest.importorskip("trl", reason="`make test-trl` brings it")
datasets = pytest.importorskip("datasets", reason="`make test-trl` brings it")
peft = pytest.importorskip("peft")

FUSED = hasattr(trl.trainer.utils, "add_fused_lm_head")
"""Whether this TRL has a fused head of its own; older ones call the model of DPO without labels."""
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and torch's: this is about our part

KEEP_ALL = {"name": "all", "stages": {"all": {"use": "control/keep-all"}}}
PYRAMID = {"name": "pyramid", "stages": {"p": {"use": "pyramiddrop/pyramid", "keep": {3: 0.5, 6: 0.25, 9: 0.1}}}}
POLICIES: Mapping[str, Any] = {"pyramid": PYRAMID, "hidrop": "hidrop-digits"}
IMAGE, END = VOCABULARY.index("<image>"), VOCABULARY.index("</s>")
"""Hot sampling must not write placeholders of images, and should end some answers early."""
UNTIMED = ("runtime", "per_second", "time", "flos", "epoch")
"""Parts of the names of what differs from run to run."""
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


class StatingSFT(trl.SFTTrainer):  # type: ignore[misc]  # TRL leaves it untyped
    """States who asks before the trainer takes the labels out of the call."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with dropflow.instruction_tokens(labels=inputs["labels"]):
            return super().compute_loss(model, inputs, *args, **kwargs)


class StatingDPO(trl.DPOTrainer):  # type: ignore[misc]
    """States who asks, for the model and its reference: the last token before each answer."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        answers = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with dropflow.instruction_tokens(labels=answers):
            return super().compute_loss(model, inputs, *args, **kwargs)


class ReplayingGRPO(trl.GRPOTrainer):  # type: ignore[misc]
    """Learns from every answer with the visual tokens that its rollout kept, as the training page shows."""

    def __init__(self, model: Any, *arguments: Any, **more: Any) -> None:
        super().__init__(model, *arguments, **more)
        self.flow = dropflow.flow_of(model)
        self.scored: list[tuple[Tensor, Tensor]] = []
        """Ids, and log-probabilities of the last of them, of every pass that is learnt from."""

    def _generate_single_turn(self, *arguments: Any, **more: Any) -> Any:
        answers = super()._generate_single_turn(*arguments, **more)
        self.kept = self.flow.keeps()
        return answers

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return super()._generate_and_score_completions(inputs) | {"keeps": list(self.kept)}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        with self.flow.replay(inputs["keeps"]):
            return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, *arguments: Any, **more: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(model, input_ids, *arguments, **more)
        if torch.is_grad_enabled():
            self.scored.append((input_ids, found[0].detach()))
        return found


def rows(*columns: str, count: int = 8) -> Any:
    """Digits questions with images, as a data set of these columns."""

    def row(image: Any, question: str, answer: str) -> dict[str, Any]:
        said = {"completion": answer, "chosen": answer, "rejected": "no no yes" if answer == "yes" else "yes"}
        found = {name: [{"role": "assistant", "content": said[name]}] for name in columns}
        return {"images": [image], "prompt": [{"role": "user", "content": question}], **found}

    drawn = islice(examples("train", count), count)
    return datasets.Dataset.from_list([row(one.image, one.question, one.answer) for one in drawn])


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Something that differs between answers."""
    return [float(sum(map(ord, one[0]["content"])) % 7) for one in completions]


def mean_loss(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The model's own loss, computed by the user."""
    logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum())


def sft(model: Any, processor: Any, folder: str, **more: Any) -> Any:
    own = {name: more.pop(name) for name in ("compute_loss_func", "peft_config") if name in more}
    arguments = trl.SFTConfig(folder, max_length=None, **COMMON | more)
    made = StatingSFT if "compute_loss_func" in own or "label_smoothing_factor" in more else trl.SFTTrainer
    return made(model, arguments, train_dataset=rows("completion"), processing_class=processor, **own)


def dpo(model: Any, processor: Any, folder: str, **more: Any) -> Any:
    own = {name: more.pop(name) for name in ("peft_config",) if name in more}
    arguments = trl.DPOConfig(folder, max_length=None, **COMMON | more)
    made = trl.DPOTrainer if FUSED else StatingDPO
    data = rows("chosen", "rejected")
    return made(model, args=arguments, train_dataset=data, processing_class=processor, **own)


def grpo(model: Any, processor: Any, folder: str, **more: Any) -> Any:
    """Two prompts, padded on the left, with two answers each; every answer is learnt from twice."""
    own = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "num_iterations": 2,
        "max_completion_length": 5,
        "temperature": 9.0,
        "generation_kwargs": {"suppress_tokens": [IMAGE], "sequence_bias": [[[END], 25.0]]},
        "beta": 0.1,
        "max_steps": 4,
    }
    made = more.pop("made", trl.GRPOTrainer)
    arguments = trl.GRPOConfig(folder, **COMMON | own | more)
    return made(model, reward, arguments, train_dataset=rows(), processing_class=processor)


Kind = Callable[..., Any]


class Run:
    """One training: what it logged, and which tokens were live in every forward of the model and its reference."""

    def __init__(self, kind: Kind, policy: Any = None, source: Run | None = None, **more: Any) -> None:
        """Under a `policy`; or plainly, or, with a `source`, with its answers and its dropped tokens masked."""
        self.calls: list[tuple[Tensor, Tensor]] = []
        """Ids and live tokens of every forward, without those of `generate`."""
        self.rollouts: list[tuple[Tensor, Tensor]] = []
        """Ids and live tokens of every prompt that was generated from."""
        self._generated: list[tuple[Tensor, Tensor]] = []
        self._masked, self._generating = iter(() if source is None else source.calls), False
        self._answers = iter(() if source is None else source._generated)
        self._source = source
        model, processor = load()
        # the masked run cannot recompute its layers
        more = {"gradient_checkpointing": source is None} | more
        with ExitStack() as attached, TemporaryDirectory() as folder:
            flow = None if policy is None else attached.enter_context(dropflow.attach(model, policy))
            trainer = kind(model, processor, folder, **more)
            self._watch(model, flow)
            model.generate = self._recording(model.generate, flow)
            reference = getattr(trainer, "ref_model", None)
            if reference is not None:
                assert reference is not model
                own = None if policy is None else attached.enter_context(dropflow.attach(reference, policy))
                self._watch(reference, own)
            trainer.train()
        assert next(self._masked, None) is None
        self.logs = [
            {name: value for name, value in row.items() if not any(part in name for part in UNTIMED)}
            for row in trainer.state.log_history
        ]

    def _watch(self, model: Any, flow: Any) -> None:
        masks: list[MaskedOracle] = []

        def before(*_: Any) -> None:
            if self._source is not None and not self._generating:
                masks.append(MaskedOracle(model, next(self._masked)[1]).__enter__())

        def after(_: Any, __: Any, kwargs: dict[str, Any], ___: Any) -> None:
            if masks:
                masks.pop().__exit__(None, None, None)
            elif flow is not None and not self._generating:
                self.calls.append((kwargs["input_ids"], flow.live()))

        model.register_forward_pre_hook(before)
        model.register_forward_hook(after, with_kwargs=True)

    def _recording(self, generate: Any, flow: Any) -> Any:
        def recorded(**arguments: Any) -> Tensor:
            if self._source is not None:
                tokens, dice = next(self._answers)
                torch.set_rng_state(dice)
                return tokens
            self._generating = True
            tokens: Tensor = generate(**arguments)
            self._generating = False
            self._generated.append((tokens, torch.get_rng_state()))
            if flow is not None:
                self.rollouts.append((arguments["input_ids"], flow.live()))
            return tokens

        return recorded


@cache
def under(kind: Kind, which: str) -> Run:
    return Run(kind, POLICIES[which])


def assert_masked(run: Run, kind: Kind, **more: Any) -> None:
    """Every number that a run under a policy logged is that of the masked run."""
    expected = Run(kind, source=run, **more)
    assert any(not live.all() for _, live in run.calls)
    assert [row.keys() for row in run.logs] == [row.keys() for row in expected.logs]
    for row, own in zip(run.logs, expected.logs, strict=True):
        for name, value in own.items():
            near = pytest.approx(value, rel=1e-5, abs=1e-6) if "loss" in name else pytest.approx(value, 1e-4, 1e-5)
            assert row[name] == near, name


@pytest.mark.parametrize("kind", [sft, dpo, grpo])
def test_a_policy_that_keeps_everything_gives_equal_bits(kind: Kind) -> None:
    plain = Run(kind)
    assert Run(kind, KEEP_ALL).logs == plain.logs
    assert all(row["grad_norm"] > 0 for row in plain.logs[:-1])


@pytest.mark.parametrize("which", POLICIES)
@pytest.mark.parametrize("kind", [sft, dpo, grpo])
def test_under_a_policy_training_is_that_of_the_masked_run(kind: Kind, which: str) -> None:
    assert_masked(under(kind, which), kind)


@pytest.mark.parametrize("which", POLICIES)
def test_scoring_passes_keep_the_tokens_of_the_rollout(which: str) -> None:
    """Of the prompt, before the weights change: TRL scores every answer again in the first step after it."""
    run = under(grpo, which)
    prompts, live = run.rollouts[0]
    assert (prompts[:, 0] == 0).any(), "no prompt is padded"
    length = prompts.shape[1]
    kept = {tuple(ids.tolist()): live[:, row] for row, ids in enumerate(prompts)}
    answers = set()
    for ids, scored in run.calls[:2]:
        for row, own in enumerate(ids):
            assert torch.equal(scored[:, row, :length], kept[tuple(own[:length].tolist())])
            answers.add(tuple(own[length:].tolist()))
    assert len({len([token for token in answer if token]) for answer in answers}) > 1, "answers are of one length"


FAST = {"learning_rate": 3.0, "beta": 0.0, "max_steps": 4}
"""Learns so fast that each step ranks other tokens than the one before."""


def strangers(run: Run) -> int:
    """How many passes over an answer kept tokens of the prompt that no rollout of this prompt kept."""
    kept: dict[tuple[int, ...], list[Tensor]] = {}
    for prompts, live in run.rollouts:
        for row, ids in enumerate(prompts):
            kept.setdefault(tuple(ids.tolist()), []).append(live[:, row])
    length = run.rollouts[0][0].shape[1]
    passes = [(ids[row], live[:, row, :length]) for ids, live in run.calls for row in range(len(ids))]
    return sum(not any(torch.equal(live, own) for own in kept[tuple(ids[:length].tolist())]) for ids, live in passes)


@pytest.mark.parametrize("which", POLICIES)
def test_replayed_answers_are_learnt_with_the_tokens_of_their_rollout(which: str) -> None:
    """Although the weights, and so the ranking, have changed since; without a replay, other tokens stay."""
    run = Run(grpo, POLICIES[which], made=ReplayingGRPO, **FAST)
    assert strangers(run) == 0
    assert strangers(Run(grpo, POLICIES[which], **FAST)) > 0


def test_log_probabilities_of_a_replay_are_those_of_the_rollout() -> None:
    """In every pass before the weights change; TRL learns twice from each rollout."""
    model, processor = load()
    rolled: list[dict[tuple[int, ...], Tensor]] = []
    generate = model.generate

    def recorded(**arguments: Any) -> Tensor:
        out = generate(**arguments, output_logits=True, return_dict_in_generate=True)
        new = out.sequences[:, arguments["input_ids"].shape[1] :]
        scores = (torch.stack(out.logits, 1) / 9.0).log_softmax(-1).gather(2, new[..., None])[..., 0]
        rolled.append({tuple(ids.tolist()): own for ids, own in zip(out.sequences, scores, strict=True)})
        return out.sequences

    model.generate = recorded
    with TemporaryDirectory() as folder, dropflow.attach(model, "hidrop-digits"):
        trainer = grpo(model, processor, folder, made=ReplayingGRPO, **FAST)
        trainer.train()
    assert len(trainer.scored) == 4
    for number in (0, 2):
        for ids, scores in zip(*trainer.scored[number], strict=True):
            said = int((ids[-scores.shape[0] :] != 0).sum())
            expected = rolled[number // 2][tuple(ids.tolist())]
            torch.testing.assert_close(scores[:said], expected[:said], atol=1e-5, rtol=1e-5)
    again = dict(zip(map(tuple, trainer.scored[1][0].tolist()), trainer.scored[1][1], strict=True))
    assert not torch.allclose(next(iter(again.values())), rolled[0][next(iter(again))], atol=1e-3)


def test_training_on_replayed_answers_is_that_of_the_masked_run() -> None:
    run = Run(grpo, PYRAMID, made=ReplayingGRPO, beta=0.0)
    assert_masked(run, grpo, beta=0.0)


def test_both_answers_of_a_preference_are_read_after_the_same_tokens() -> None:
    """By the model and its reference: the last token of their prompt asks, not that of an answer."""
    for ids, live in under(dpo, "pyramid").calls[:2]:
        (chosen, rejected), (first, second) = ids.chunk(2), live.chunk(2, 1)
        shared = (chosen == rejected).all(0).long().cumprod(0).bool()
        assert not shared.all()
        assert torch.equal(first[:, :, shared], second[:, :, shared])


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run = Run(sft, PYRAMID, **halves)
    assert_masked(run, sft, **halves)
    for row, whole in zip(run.logs, under(sft, "pyramid").logs, strict=True):
        for name in row.keys() & {"loss", "train_loss", "grad_norm"}:
            assert row[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "more", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": mean_loss}], ids=lambda one: next(iter(one))
)
def test_labels_taken_out_of_the_call_are_stated(more: dict[str, Any]) -> None:
    run = Run(sft, PYRAMID, **more)
    assert_masked(run, sft, **more)
    (ids, live), (expected_ids, expected) = run.calls[0], under(sft, "pyramid").calls[0]
    assert torch.equal(ids, expected_ids)
    assert torch.equal(live, expected)


def test_nobody_asks_where_every_token_is_labelled() -> None:
    """TRL labels whole conversations; stages that rank then keep everything, as the training page says."""

    def conversations(model: Any, processor: Any, folder: str, **more: Any) -> Any:
        data = rows("completion").map(lambda row: {"messages": row["prompt"] + row["completion"]})
        data = data.remove_columns(["prompt", "completion"])
        arguments = trl.SFTConfig(folder, max_length=None, **COMMON | {"max_steps": 1} | more)
        return trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=processor)

    ((ids, live),) = Run(conversations, PYRAMID).calls
    assert (ids == IMAGE).any(1).all()
    assert live.all(0).equal(ids != VOCABULARY.index("<pad>"))


def test_the_smoothed_loss_of_preferences_is_the_masked_runs() -> None:
    more = {"label_smoothing": 0.1, "loss_type": ["robust"]}
    assert_masked(Run(dpo, PYRAMID, **more), dpo, **more)


@pytest.mark.skipif(FUSED, reason="newer releases have one fused loss alone")
def test_a_chunked_loss_is_the_masked_runs() -> None:
    run = Run(sft, PYRAMID, loss_type="chunked_nll")
    assert_masked(run, sft, loss_type="chunked_nll")
    assert run.logs[0]["loss"] == pytest.approx(under(sft, "pyramid").logs[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", [sft, dpo])
def test_low_rank_adapters_train_as_in_the_masked_run(kind: Kind) -> None:
    """DPO's reference is then the same model without its adapters."""
    targets = r".*language_model.*(q_proj|v_proj)"
    more = {"peft_config": peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)}
    torch.manual_seed(0)
    run = Run(kind, PYRAMID, **more)
    torch.manual_seed(0)
    assert_masked(run, kind, **more)


def test_labelled_logits_are_refused_beside_a_fused_head() -> None:
    model, processor = load()
    fused = {} if FUSED else {"loss_type": "chunked_nll"}
    with TemporaryDirectory() as folder, dropflow.attach(model, PYRAMID, logits="labelled"):
        trainer = sft(model, processor, folder, **fused)
        with pytest.raises(UnsupportedModel, match=r"logits: 'labelled', but the forward .* leave `logits` out"):
            trainer.train()


@pytest.mark.skipif(not FUSED, reason="the page shows the newer releases")
def test_the_examples_of_the_training_page_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    policy = dropflow.load_policy(POLICIES["hidrop"])
    Path("my-policy.yaml").write_text(yaml.safe_dump(policy.to_dict()))
    shown = [block for block in blocks("docs/training.md", "python") if "from trl" in block.text]
    data = {"questions": rows("completion"), "preferences": rows("chosen", "rejected"), "prompts": rows()}
    for kind in ("SFT", "DPO", "GRPO"):
        monkeypatch.setattr(trl, f"{kind}Config", partial(getattr(trl, f"{kind}Config"), use_cpu=True))
    for block in shown:
        model, processor = load()
        known = {"dropflow": dropflow, "model": model, "processor": processor, "reward": reward, **data}
        exec(block.text, known)
        assert known["trainer"].state.global_step == 2
        report = known["flow"].report()
        assert report.layers[-1].visual_tokens < report.layers[3].visual_tokens
        assert '"dropflow"' in next(tmp_path.glob("*/checkpoint-2/config.json")).read_text()
    assert len(shown) == 4

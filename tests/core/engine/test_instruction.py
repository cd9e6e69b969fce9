"""Who asks: right defaults where the call tells, and one way to state it where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_training import labelled
from tiny import PAD, policy, prompt, relative_error
from torch import Tensor
from transformers import Trainer, TrainingArguments

import dropflow
from dropflow import PruneCall, Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import UnsupportedCall
from dropflow.testing import tiny_models

PYRAMID = policy(p={"use": "pyramiddrop/pyramid", "keep": {2: 0.5, 4: 0.2}})


class Asks(Stage[Any]):
    """Records who asks."""

    prune_at = (0,)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.seen: list[list[list[int]]] = []

    @hookimpl
    def prune(self, call: PruneCall) -> None:
        tokens = call.index.gather(1, call.instruction_slots)
        self.seen.append([row[ok].tolist() for row, ok in zip(tokens, call.instruction_valid, strict=True)])


def asked(model: Any, inputs: dict[str, Any], **more: Any) -> list[list[int]]:
    with torch.no_grad(), dropflow.attach(model, policy(asks={"use": Asks})) as flow:
        model(**inputs, **more)
        stage: Any = flow.plan.stages[0][1]
        return stage.seen[-1]


def scoring(answers: tuple[int, ...] = (4, 2)) -> tuple[dict[str, Any], int, int]:
    """A left-padded prompt with answers padded on the right: inputs, length of the prompt, length of the answers."""
    inputs = prompt([(3, "I", 5), (1, "I", 2)])
    length, most = inputs["input_ids"].shape[1], max(answers)
    rows = torch.full((2, most), PAD)
    mask = torch.zeros(2, most, dtype=torch.long)
    for row, count in enumerate(answers):
        rows[row, :count] = torch.arange(20, 20 + count)
        mask[row, :count] = 1
    whole = {
        "input_ids": torch.cat((inputs["input_ids"], rows), 1),
        "attention_mask": torch.cat((inputs["attention_mask"], mask), 1),
    }
    return inputs | whole, length, most


@pytest.mark.parametrize("more", [0, 1])
def test_a_scoring_pass_is_ranked_as_the_prompt_was(llava: Any, more: int) -> None:
    inputs, length, answers = scoring()
    keep = answers + 1
    by_number = asked(llava, inputs, logits_to_keep=keep)
    positions = torch.arange(inputs["input_ids"].shape[1])[-keep:]
    assert by_number == [[length - 1], [length - 1]]
    assert asked(llava, inputs, logits_to_keep=positions) == by_number
    assert asked(llava, inputs, logits_to_keep=positions.flip(0)[: keep - more].sort().values)[0] == [length - 1 + more]


@pytest.mark.parametrize("family", ["llava_onevision", "minicpmv4_6", "gemma4"])
@torch.no_grad()
def test_a_scoring_pass_where_the_decoder_gets_the_positions_too(family: str) -> None:
    """Its layers would get a tensor of which none can tell which tokens it holds."""
    adapter, tiny = tiny_models()[family]
    model, inputs = tiny.model(), tiny.prompt()[0]
    positions = torch.arange(inputs["input_ids"].shape[1])[-3:]
    with dropflow.attach(model, PYRAMID, adapter=adapter):
        by_number, by_positions = (model(**inputs, logits_to_keep=keep).logits for keep in (3, positions))
    assert torch.equal(by_positions[:, -3:], by_number[:, -3:])  # MiniCPM-V returns all of them in either case


@pytest.mark.parametrize("as_positions", [False, True])
def test_a_scoring_pass_over_packed_rows_ranks_the_scored_document_as_its_prompt(
    llava: Any, as_positions: bool
) -> None:
    documents = [prompt([(3, "I", 5)]), prompt([(2, "I", 6)], seed=4)]
    (first, second), answer = [one["input_ids"].shape[1] for one in documents], 4
    packed = {
        "input_ids": torch.cat([one["input_ids"] for one in documents], 1),
        "pixel_values": torch.cat([one["pixel_values"] for one in documents]),
        "position_ids": torch.cat([torch.arange(first), torch.arange(second)])[None],
        "use_cache": False,
    }
    keep: Any = torch.arange(first + second)[-answer - 1 :] if as_positions else answer + 1
    assert asked(llava, packed) == [[first - 1, first + second - 1]]
    assert asked(llava, packed, logits_to_keep=keep) == [[first - 1, first + second - answer - 1]]
    with torch.no_grad(), dropflow.attach(llava, PYRAMID) as flow:
        scored, live = llava(**packed, logits_to_keep=keep).logits, flow.live()
        own, keep = documents[1], torch.arange(second)[-answer - 1 :] if as_positions else keep
        alone = llava(**own, logits_to_keep=keep, use_cache=False).logits
        assert torch.equal(live[:, :, first:], flow.live())
    assert relative_error(scored, alone) < 1e-5


@torch.no_grad()
def test_a_scoring_pass_gives_the_log_probabilities_of_the_rollout(llava: Any) -> None:
    inputs = prompt([(3, "I", 5), (1, "I", 2)])
    budget = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    with dropflow.attach(llava, PYRAMID):
        rollout = llava.generate(**inputs, **budget, return_dict_in_generate=True)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
        again = inputs | {"input_ids": rollout.sequences, "attention_mask": mask}
        scored = llava(**again, logits_to_keep=6).logits[:, :-1]
    assert relative_error(scored, torch.stack(rollout.logits, 1)) < 1e-5


def test_a_sample_that_ends_early_asks_by_its_last_real_token(llava: Any) -> None:
    inputs, length, _ = scoring()
    inputs["attention_mask"][1, length - 2 : length] = 0  # padding at the end of the second prompt
    assert asked(llava, inputs, logits_to_keep=5) == [[length - 1], [length - 3]]


def test_stated_tokens_ask(llava: Any) -> None:
    inputs = prompt([(3, "I", 5), (1, "I", 2)])
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, -3] = mask[0, -5] = True
    with dropflow.instruction_tokens(mask):
        assert asked(llava, inputs) == [[mask.shape[1] - 5, mask.shape[1] - 3], []]
    assert asked(llava, inputs) == [[mask.shape[1] - 1]] * 2


def test_stated_labels_ask_as_labels_in_the_call_do(llava: Any) -> None:
    inputs = labelled()
    labels = inputs.pop("labels")
    with dropflow.instruction_tokens(labels=labels):
        stated = asked(llava, inputs)
    assert stated == asked(llava, inputs, labels=labels)
    assert stated != asked(llava, inputs)


def test_a_statement_covers_every_chunk_of_a_prompt(llava: Any) -> None:
    inputs = prompt([(3, "I", 5, "I", 6)])
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    first_image = 4 + 16
    mask[0, first_image + 2] = mask[0, -2] = True
    with torch.no_grad(), dropflow.attach(llava, policy(asks={"use": Asks})) as flow, dropflow.instruction_tokens(mask):
        cut = first_image + 5
        half = inputs | {"input_ids": inputs["input_ids"][:, :cut], "pixel_values": inputs["pixel_values"][:1]}
        out = llava(**half | {"attention_mask": inputs["attention_mask"][:, :cut]})
        cache = getattr(out, CACHE_ARGUMENT)
        rest = inputs | {"input_ids": inputs["input_ids"][:, cut:], "pixel_values": inputs["pixel_values"][1:]}
        llava(**rest, **{CACHE_ARGUMENT: cache})
        stage: Any = flow.plan.stages[0][1]
    assert stage.seen == [[[first_image + 2]], [[mask.shape[1] - 2 - cut]]]


@torch.no_grad()
def test_a_statement_is_for_all_copies_of_a_sample_and_for_no_other_prompt(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, -3] = True
    with dropflow.attach(llava, policy(asks={"use": Asks})) as flow, dropflow.instruction_tokens(mask):
        llava.generate(**inputs, num_beams=2, max_new_tokens=2, do_sample=False)
        stage: Any = flow.plan.stages[0][1]
        assert stage.seen[0] == [[mask.shape[1] - 3]] * 2
        others = prompt([(3, "I", 5), (3, "I", 5)])
        with pytest.raises(UnsupportedCall, match=r"instruction_tokens: stated for \(1, \d+\) \(batch, tokens\), but"):
            llava(**others)


@torch.no_grad()
def test_one_question_is_not_taken_for_those_of_other_prompts(llava: Any) -> None:
    class Reads(Asks):
        reads_questions = True

    reading = policy(reads={"use": Reads})
    with dropflow.attach(llava, reading), dropflow.questions(["what?"]):
        with pytest.raises(UnsupportedCall, match=r"questions: 1 stated for a batch of 2 different prompts"):
            llava(**prompt([(3, "I", 5), (3, "I", 5)]))
        llava.generate(**prompt([(3, "I", 5)]), num_beams=2, max_new_tokens=1, do_sample=False)


@torch.no_grad()
def test_stated_visual_tokens_are_not_taken_for_those_of_other_prompts(llava: Any) -> None:
    inputs = prompt([(3, "I", 5), (3, "I", 5)])
    embeds = llava.get_input_embeddings()(inputs["input_ids"])
    visual = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
    visual[0, 4:20] = True
    with dropflow.attach(llava, PYRAMID) as flow, flow.visual(visual):
        with pytest.raises(UnsupportedCall, match=r"visual: stated for \(1, \d+\)"):
            llava(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        llava(inputs_embeds=embeds[:1].expand(2, -1, -1), attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize(
    ("mask", "labels"),
    [
        (None, None),
        (torch.ones(1, 4).bool(), torch.ones(1, 4).long()),
        (torch.ones(4).bool(), None),
        (torch.ones(1, 4), None),
    ],
)
def test_a_statement_that_says_nothing_is_refused(mask: Tensor | None, labels: Tensor | None) -> None:
    with (
        pytest.raises(UnsupportedCall, match="instruction_tokens: expected"),
        dropflow.instruction_tokens(mask, labels=labels),
    ):
        pass


class Stating(Trainer):
    """States who asks before the trainer takes the labels out of the call."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with dropflow.instruction_tokens(labels=inputs["labels"]):
            return super().compute_loss(model, inputs, *args, **kwargs)


def the_models_own_loss(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG001
    logits, targets = output["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets)


@pytest.mark.parametrize("how", ["compute_loss_func", "label_smoothing_factor"])
def test_a_trainer_that_takes_the_labels_out_ranks_as_with_them(how: str, tmp_path: Any) -> None:
    from tiny import tiny_llava

    model, inputs = tiny_llava().train(), labelled()
    samples = [inputs]
    options: dict[str, Any] = {"label_smoothing_factor": 1e-12} if how == "label_smoothing_factor" else {}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, remove_unused_columns=False, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=0.0, save_strategy="no", **options,
    )  # fmt: skip
    more = {} if options else {"compute_loss_func": the_models_own_loss}
    with dropflow.attach(model, PYRAMID) as flow:
        output, targets = model(**inputs), inputs["labels"].flatten()
        smoothed = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets)  # a Trainer shifts no labels
        expected, live = (smoothed if options else output.loss).item(), flow.live()
        trainer = Stating(
            model=model, args=arguments, train_dataset=samples, data_collator=lambda rows: rows[0], **more
        )
        loss = trainer.train().training_loss
        assert torch.equal(flow.live(), live)
    assert loss == pytest.approx(expected, rel=1e-5)

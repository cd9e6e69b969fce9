"""A later forward keeps the very tokens that a rollout kept: in training, in other batches, in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDROP, IMAGE, RAGGED, policy, prompt, relative_error, tiny_llava
from torch import Tensor

import dropflow
from dropflow import Keep, Keeps, PruneCall, Stage, hookimpl
from dropflow.errors import UnsupportedCall
from dropflow.testing import tiny_models

SAMPLES = ((3, "I", 5), (1, "I", 2, "I", 10), (4,))


class Merging(Stage[Any]):
    """Merges every other patch into the one before it."""

    prune_at = (2,)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        slots = torch.arange(call.index.shape[1]).expand_as(call.index)
        odd = (call.image_id >= 0) & ((call.image_id >= 0).cumsum(1) % 2 == 0)
        return Keep(~odd, merge_into=torch.where(odd, slots - 1, slots))


POLICIES: dict[str, Any] = {
    "hidrop": HIDROP,
    "ragged": RAGGED,
    "encode": policy(
        d={"use": "divprune/max-min", "keep": 0.5}, p={"use": "pyramiddrop/pyramid", "keep": {2: 0.4, 4: 0.2}}
    ),
    "merges": policy(m={"use": Merging}, p={"use": "pyramiddrop/pyramid", "keep": {4: 0.2}}),
}
BUDGET = {"max_new_tokens": 5, "min_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}


def rollout(
    model: Any, inputs: dict[str, Any], which: Any, **more: Any
) -> tuple[Any, Tensor, tuple[dropflow.Keeps, ...]]:
    """Sampled answers, the log-probabilities of their tokens (batch, 5), and the keeps."""
    torch.manual_seed(0)
    with torch.no_grad(), dropflow.attach(model, which) as flow:
        out = model.generate(**inputs, **BUDGET, do_sample=True, **more)
        keeps = flow.keeps()
    answers = out.sequences[:, -5:]
    scores = torch.stack(out.logits, 1).log_softmax(-1).gather(2, answers[..., None])[..., 0]
    return out.sequences, scores, keeps


def scored(model: Any, inputs: dict[str, Any], sequences: Tensor) -> Tensor:
    """Log-probabilities of the last five tokens, in one forward."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    logits = model(**inputs | {"input_ids": sequences, "attention_mask": mask}, logits_to_keep=6).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, sequences[:, -5:, None])[..., 0]


@pytest.mark.parametrize("which", POLICIES)
def test_a_training_forward_gives_the_rollouts_log_probabilities(which: str) -> None:
    model, inputs = tiny_llava(), prompt(SAMPLES)
    sequences, expected, keeps = rollout(model, inputs, POLICIES[which])
    model.train()
    with dropflow.attach(model, POLICIES[which]) as flow:
        with flow.replay(keeps):
            got = scored(model, inputs, sequences)
        live, again = flow.live(), flow.keeps()
        got.sum().backward()
    assert relative_error(got.detach(), expected) < 1e-5
    assert again == keeps
    visual = sequences == IMAGE
    assert 0 < (live & visual).sum() < len(live) * visual.sum()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@torch.no_grad()
def test_the_keeps_stand_although_the_weights_and_so_the_ranking_have_changed() -> None:
    model, inputs = tiny_llava(), prompt(SAMPLES)
    sequences, _, keeps = rollout(model, inputs, RAGGED)
    for weight in model.model.language_model.parameters():
        weight.add_(torch.randn_like(weight) * 0.3)
    with dropflow.attach(model, RAGGED) as flow:
        scored(model, inputs, sequences)
        assert flow.keeps() != keeps
        with flow.replay(keeps):
            scored(model, inputs, sequences)
        assert flow.keeps() == keeps


@torch.no_grad()
def test_samples_may_stand_in_other_batches_and_with_other_padding() -> None:
    model, inputs = tiny_llava(), prompt(SAMPLES)
    sequences, expected, keeps = rollout(model, inputs, RAGGED)
    with dropflow.attach(model, RAGGED) as flow, flow.replay([keeps[1]]):
        real = inputs["attention_mask"][1].bool()
        alone = {
            "input_ids": inputs["input_ids"][1:2, real],
            "attention_mask": inputs["attention_mask"][1:2, real],
            "pixel_values": inputs["pixel_values"][1:],
        }
        row = torch.cat((alone["input_ids"], sequences[1:2, -5:]), 1)
        got = scored(model, alone, row)
    assert relative_error(got, expected[1:2]) < 1e-5


@torch.no_grad()
def test_each_returned_sequence_has_keeps_of_its_own() -> None:
    model, inputs = tiny_llava(), prompt([(3, "I", 5), (2, "I", 3)])
    sequences, expected, keeps = rollout(model, inputs, RAGGED, num_return_sequences=2)
    assert len(keeps) == 4
    assert keeps[0] == keeps[1] != keeps[2]
    repeated = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
    with dropflow.attach(model, RAGGED) as flow, flow.replay(keeps):
        assert relative_error(scored(model, repeated, sequences), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "lfm2_vl", "gemma3"])
def test_on_other_families(family: str) -> None:
    adapter, tiny = tiny_models()[family]
    model, inputs = tiny.model(), tiny.prompt()[0]
    which = policy(i={"use": "hidrop/late-injection", "at": 1}, p={"use": "pyramiddrop/pyramid", "keep": {3: 0.5}})
    with dropflow.attach(model, which, adapter=adapter) as flow:
        expected, keeps, live = model(**inputs).logits, flow.keeps(), flow.live()
        with flow.replay(keeps):
            got = model(**inputs).logits
        assert torch.equal(flow.live(), live)
    real = inputs["attention_mask"].bool()
    assert relative_error(got[real], expected[real]) < 1e-5


OTHER = """
import json, sys, torch
sys.path[:0] = {path!r}
from test_replay import *
from dropflow import Keeps
given = json.loads(open({file!r}).read())
model, inputs = tiny_llava().train(), prompt(SAMPLES)
keeps = [Keeps.from_dict(own) for own in given["keeps"]]
with dropflow.attach(model, RAGGED) as flow, flow.replay(keeps):
    got = scored(model, inputs, torch.tensor(given["sequences"]))
print(float((got - torch.tensor(given["scores"])).abs().max()), flow.keeps() == tuple(keeps))
"""


def test_from_plain_data_on_a_model_of_ones_own() -> None:
    sequences, scores, keeps = rollout(tiny_llava(), prompt(SAMPLES), RAGGED)
    text = json.dumps([own.to_dict() for own in keeps])
    read = [Keeps.from_dict(own) for own in json.loads(text)]
    model = tiny_llava().train()
    with dropflow.attach(model, RAGGED) as flow, flow.replay(read):
        got = scored(model, prompt(SAMPLES), sequences)
    assert float((got - scores).detach().abs().max()) < 1e-5
    assert flow.keeps() == keeps
    assert len(text) < 60 * sum(len(own.visual) for own in keeps) + 500


@pytest.mark.slow
def test_in_another_process(tmp_path: Path) -> None:
    sequences, scores, keeps = rollout(tiny_llava(), prompt(SAMPLES), RAGGED)
    file = tmp_path / "rollout.json"
    given = {"sequences": sequences.tolist(), "scores": scores.tolist(), "keeps": [own.to_dict() for own in keeps]}
    file.write_text(json.dumps(given))
    here = Path(__file__).parent
    script = OTHER.format(path=[str(here), str(here.parents[1])], file=str(file))
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 1e-5
    assert out[1] == "True"


@torch.no_grad()
def test_keeps_of_other_prompts_are_refused(llava: Any) -> None:
    inputs = prompt(SAMPLES)
    _, _, keeps = rollout(llava, inputs, RAGGED)
    with dropflow.attach(llava, RAGGED) as flow:
        cases = [
            (keeps[:2], "2 samples, but this call has 3"),
            ((keeps[1], keeps[0], keeps[2]), "other visual tokens than sample 0"),
            ([dropflow.Keeps(7, own.entry, own.visual, own.until) for own in keeps], "7 layers, but this model has 6"),
        ]
        for given, message in cases:
            with flow.replay(given), pytest.raises(UnsupportedCall, match=f"replay: the keeps have {message}"):
                llava(**inputs)
        again = llava(**inputs).logits
        assert again.isfinite().all()


@torch.no_grad()
def test_pictures_that_are_encoded_to_other_tokens_are_refused(llava: Any) -> None:
    inputs = prompt(SAMPLES)
    _, _, keeps = rollout(llava, inputs, POLICIES["encode"])
    other = inputs | {"pixel_values": torch.randn_like(inputs["pixel_values"])}
    refused = pytest.raises(UnsupportedCall, match="tokens that an `encode` stage drops now")
    with dropflow.attach(llava, POLICIES["encode"]) as flow, flow.replay(keeps), refused:
        llava(**other)


def test_a_policy_that_evicts_while_answering_is_refused(llava: Any) -> None:
    evicting = policy(cache={"use": "mustdrop/output-aware-cache", "at": 2})
    with dropflow.attach(llava, evicting) as flow:
        with pytest.raises(UnsupportedCall, match=r"stages\.cache: evicts or parks entries while answering"):
            flow.keeps()
        with pytest.raises(UnsupportedCall, match=r"stages\.cache: evicts"), flow.replay([]):
            pass


@pytest.mark.parametrize(
    "data", [{}, {"layers": 6}, {"layers": 6, "entry": 9, "visual": [], "until": [], "merges": {}}, 3]
)
def test_data_that_are_no_keeps_are_refused(data: Any) -> None:
    with pytest.raises(UnsupportedCall, match="keeps: expected"):
        dropflow.Keeps.from_dict(data)

"""Stages that own a trained module: where it is registered, what it adds to the loss, how it is saved and loaded."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HIDROP, policy, prompt, tiny_llava
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from training import Prompts, collate, freeze_tower, trainer

import dropflow
from dropflow import Backbone, Encode, EncodeCall, Forecast, Keep, PruneCall, Stage, StageOptions, hookimpl
from dropflow.errors import DecisionError, PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.testing.guarantees import fingerprint

FILE = "dropflow.safetensors"


class GateOptions(StageOptions):
    share: float = 0.5
    weight: float = 0.25


class Gate(Stage[GateOptions]):
    """Training scales every row by a learned gate, and pays for open gates; otherwise the best rows stay."""

    Options = GateOptions
    published_as: ClassVar[tuple[str, ...]] = ("visual.gate.",)

    def build_module(self, backbone: Backbone) -> nn.Module:
        return nn.Linear(backbone.decoder_widths.hidden, 1)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        assert call.module is not None
        scores = [call.module(rows.to(call.module.weight.dtype))[:, 0] for rows in call.features]
        if not call.training:
            return Encode(keep=tuple(s >= s.quantile(1 - self.options.share) for s in map(Tensor.float, scores)))
        gates = [score.sigmoid()[:, None].to(call.features[0]) for score in scores]
        rows = tuple(gate * own for gate, own in zip(gates, call.features, strict=True))
        return Encode(rows=rows, places=call.places, loss=self.options.weight * torch.cat(gates).mean())


class Toll(Stage[StageOptions]):
    """Drops nothing in the LLM, and adds a learned number to the loss at two boundaries."""

    prune_at = (1, 3)
    float32 = True

    def build_module(self, backbone: Backbone) -> nn.Module:  # noqa: ARG002
        module = nn.Module()
        module.toll = nn.Parameter(torch.tensor(0.5))
        return module

    def forecast(self) -> Forecast:
        return Forecast(keeps=dict.fromkeys(self.prune_at))

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        assert call.module is not None
        return Keep(torch.ones_like(call.valid), loss=call.module.toll * call.boundary)


GATE = {"use": Gate}


def labelled(model: Any) -> dict[str, Any]:  # noqa: ARG001
    inputs = prompt([(3, "I", 9), ("I", 2, "I", 12), (8,)])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs | {"labels": labels}


def names_of(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith("dropflow_stages")}


def test_a_module_is_the_models_while_attached_and_leaves_no_trace() -> None:
    model = tiny_llava().to(torch.bfloat16)
    model(**prompt())  # transformers installs hooks of its own at the first forward
    before = fingerprint(model)
    with dropflow.attach(model, policy(gate=GATE, toll={"use": Toll})) as flow:
        assert names_of(model) == {f"dropflow_stages.{own}" for own in ("gate.weight", "gate.bias", "toll.toll")}
        assert flow.modules["gate"].weight.dtype == torch.bfloat16
        assert flow.modules["toll"].toll.dtype == torch.float32
        assert set(model.state_dict()) - set(before[0]) == names_of(model)
    assert fingerprint(model) == before
    with dropflow.attach(model, HIDROP):
        assert not names_of(model)


def test_wherever_attaching_is_interrupted_no_module_stays() -> None:
    """After any line of the engine that attaching passes, detaching leaves the model as it was."""
    model, passed = tiny_llava(), []
    model(**prompt())
    before = fingerprint(model)

    def count(limit: int) -> bool:
        seen = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal seen
            if f"{'dropflow'}/engine" not in frame.f_code.co_filename.replace("\\", "/"):
                return None
            if event == "line":
                seen += 1
                if seen == limit:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            dropflow.attach(model, policy(gate=GATE))
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            passed.append(seen)
        return False

    for _ in range(2):  # what is cached is not done again
        assert not count(0)
        dropflow.detach(model)
    for limit in range(1, passed[1], 11):
        assert count(limit)
        dropflow.detach(model)
        assert fingerprint(model) == before, f"interrupted after {limit} lines"


def test_the_loss_of_the_stages_is_added_to_the_models_own() -> None:
    model = tiny_llava().train()
    inputs = labelled(model)
    with dropflow.attach(model, policy(gate=GATE | {"weight": 0.0})):
        own = model(**inputs).loss
    with dropflow.attach(model, policy(gate=GATE, toll={"use": Toll})) as flow:
        output = model(**inputs)
        added = flow.stage_loss
        assert added is not None
        with torch.no_grad():
            features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
        gates = flow.modules["gate"](plain_features(model, inputs)).sigmoid()
        assert features.shape[1] == 32
        assert added.item() == pytest.approx(0.25 * gates.mean().item() + 0.5 * (1 + 3), rel=1e-5)
        assert output.loss.item() == pytest.approx(own.item() + added.item(), rel=1e-5)
        output.loss.backward()
        assert flow.modules["toll"].toll.grad.item() == pytest.approx(4)
        assert flow.modules["gate"].weight.grad.abs().max() > 0
        as_tuple = model(**inputs, return_dict=False)
        assert as_tuple[0].item() == pytest.approx(output.loss.item(), rel=1e-6)
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        assert model(**unlabelled).get("loss") is None
        assert flow.stage_loss is not None
        assert flow.stage_loss.item() == pytest.approx(added.item(), rel=1e-6)
        model.eval()(**inputs)
        assert flow.stage_loss is None


def plain_features(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the projector makes of the pictures, without a policy."""
    seen: list[Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[-1].flatten(0, -2)


def test_labelled_logits_have_the_same_loss() -> None:
    model = tiny_llava().train()
    found = []
    for logits in ("all", "labelled"):
        with dropflow.attach(model, policy(gate=GATE), logits=logits):  # type: ignore[arg-type]
            found.append(model(**labelled(model)).loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_features_that_were_encoded_before_bring_their_loss() -> None:
    model = tiny_llava().train()
    inputs = labelled(model)
    with dropflow.attach(model, policy(gate=GATE)) as flow:
        whole = model(**inputs).loss
        pixels = inputs.pop("pixel_values")
        features = model.model.get_image_features(pixels)
        try:
            parts = model(**inputs, mm_encoder_outputs={"image": features}).loss
        except TypeError:
            pytest.skip("this transformers has no `mm_encoder_outputs`")
        assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
        assert flow.stage_loss is not None


def test_accumulated_steps_weigh_the_stages_once(tmp_path: Path) -> None:
    """Two steps of two samples with the gradients accumulated are one step of four."""
    pytest.importorskip("accelerate")
    found = []
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        model = freeze_tower(tiny_llava())
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        with dropflow.attach(model, policy(toll={"use": Toll})) as flow:
            trainer(model, tmp_path / str(batch), max_steps=2, **sizes)[0].train()
            found.append(flow.modules["toll"].toll.item())
    # the last of the first four samples, alone, and the eighth, which has no picture, pay no toll
    assert found[0] == pytest.approx(0.5 - 2 * 0.05 * 4, rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] > found[0]


def test_a_checkpoint_has_the_weights_beside_the_policy(tmp_path: Path, caplog: Any) -> None:
    model, inputs = tiny_llava(), prompt()
    with dropflow.attach(model, "divprune-56", overrides=["rescale=true"]):
        model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / FILE).exists()
    with caplog.at_level(logging.WARNING, logger="dropflow"):
        flow = dropflow.attach(model, policy(gate=GATE))
    assert caplog.messages == ["stages.gate: starts with fresh weights; train it, or name a folder with `weights=`"]
    nn.init.normal_(flow.modules["gate"].weight, generator=torch.Generator().manual_seed(3))
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    with pytest.raises(UnsupportedCall, match="push_to_hub: would leave out"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    with pytest.raises(UnsupportedCall, match=r"record: stages\.gate: has trained weights"):
        flow.record()
    flow.detach()
    for name in ("trained", "given"):
        assert set(load_file(tmp_path / name / FILE)) == {"gate.weight", "gate.bias"}
        assert not [key for key in load_file(tmp_path / name / "model.safetensors") if "dropflow" in key]
    with dropflow.attach(model, policy(gate=GATE), weights=tmp_path / "given"):
        assert torch.equal(model(**inputs).logits, expected)
    with dropflow.attach(model, policy(gate=GATE), weights=tmp_path / "given" / FILE) as flow:
        assert torch.equal(model(**inputs).logits, expected)
        flow.save_stages(tmp_path / "alone")
    assert load_file(tmp_path / "alone" / FILE).keys() == {"gate.weight", "gate.bias"}


def test_a_recorded_policy_brings_its_weights_or_is_refused(tmp_path: Path) -> None:
    """With a registered stage, whose name a config can hold."""
    use = {"use": "hidrop/concave-pyramid", "keep": {2: 8, 4: 4}, "learn": True, "budget": {"average_tokens": 6}}
    model, inputs = tiny_llava(), prompt()
    with dropflow.attach(model, policy(pyramid=use)) as flow:
        with torch.no_grad():
            flow.modules["pyramid"].logits.copy_(torch.tensor([1.0, -2.0]))  # type: ignore[operator]
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
    loaded = dropflow.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    dropflow.detach(loaded)
    with dropflow.attach(loaded, overrides=["positions=persistent"]):
        assert torch.equal(loaded(**inputs).logits, expected)
    shutil.move(tmp_path / FILE, tmp_path / "elsewhere.safetensors")
    message = rf"attach: stages\.pyramid: the recorded policy has trained weights, but '.*' has no {FILE}; name the"
    with pytest.raises(PolicyError, match=message):
        dropflow.attach(loaded)
    with dropflow.attach(loaded, weights=tmp_path / "elsewhere.safetensors"):
        assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"gate.weight": torch.ones(1, 32)}, "not the weights of stages.gate: lacks bias; name with"),
        ({"gate.weight": torch.ones(1, 31), "gate.bias": torch.ones(1)}, r"weight is \(1, 31\), expected \(1, 32\)"),
        (
            {"gate.weight": torch.ones(1, 32), "gate.bias": torch.ones(1), "gate.scale": torch.ones(1)},
            "has gate.scale, which the stage does not know",
        ),
        ({"other.weight": torch.ones(1, 32)}, "lacks weight, bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, states: dict[str, Tensor], message: str) -> None:
    model = tiny_llava()
    save_file(states, tmp_path / FILE)
    before = fingerprint(model)
    with pytest.raises(PolicyError, match=message):
        dropflow.attach(model, policy(gate=GATE), weights=tmp_path)
    assert fingerprint(model) == before


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    model = tiny_llava()
    with pytest.raises(PolicyError, match="expected a safetensors file, or a folder with"):
        dropflow.attach(model, policy(gate=GATE), weights=tmp_path)
    (tmp_path / FILE).write_bytes(b"not safetensors")
    with pytest.raises(PolicyError, match="cannot be read"):
        dropflow.attach(model, policy(gate=GATE), weights=tmp_path)
    with pytest.raises(PolicyError, match="weights: given, but no stage"):
        dropflow.attach(model, HIDROP, weights=tmp_path)


def test_a_published_checkpoint_has_them_under_another_name(tmp_path: Path) -> None:
    weight, bias = torch.randn(1, 32), torch.randn(1)
    save_file({"visual.gate.weight": weight, "lm_head.weight": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"visual.gate.bias": bias}, tmp_path / "model-2.safetensors")
    with dropflow.attach(tiny_llava(), policy(gate=GATE), weights=tmp_path) as flow:
        assert torch.equal(flow.modules["gate"].weight, weight)
        assert torch.equal(flow.modules["gate"].bias, bias)


def test_policies_of_a_set_share_a_module_by_its_name() -> None:
    model, inputs = tiny_llava(), prompt()
    policies = {"dense": None, "half": policy(gate=GATE), "most": policy(gate=GATE | {"share": 0.8})}
    with dropflow.attach_set(model, policies, default="half") as flows:
        half, most = flows["half"], flows["most"]
        assert half is not None
        assert most is not None
        assert half.modules["gate"] is most.modules["gate"]
        assert names_of(model) == {"dropflow_stages.gate.weight", "dropflow_stages.gate.bias"}
        counts = []
        for name in ("half", "most"):
            with flows.using(name) as flow:
                assert flow is not None
                model(**inputs)
                counts.append(flow.report().layers[0].visual_tokens)
        assert counts[0] < counts[1]
        with pytest.raises(UnsupportedCall, match="save_stages: no stage"):
            dropflow.attach(tiny_llava(), HIDROP).save_stages("nowhere")


def test_a_set_refuses_two_modules_of_one_name() -> None:
    policies = {"one": policy(stage=GATE), "two": policy(stage={"use": Toll})}
    with pytest.raises(PolicyError, match=r"stages\.stage: two policies of the set build different modules"):
        dropflow.attach_set(tiny_llava(), policies, default="one")


def test_every_process_builds_the_same_and_the_generator_stays() -> None:
    model = tiny_llava()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with dropflow.attach(model, policy(gate=GATE)) as flow:
        first = flow.modules["gate"].weight.clone()
    assert torch.equal(torch.rand(3), expected)
    with dropflow.attach(model, policy(gate=GATE)) as flow:
        assert torch.equal(flow.modules["gate"].weight, first)


def test_a_stage_that_follows_progress_is_told_or_refused() -> None:
    class Following(Gate):
        seen: ClassVar[list[float]] = []
        follows_progress = True

        @hookimpl
        def encode(self, call: EncodeCall) -> None:
            self.seen.append(call.progress)

    model = tiny_llava()
    with dropflow.attach(model, policy(gate={"use": Following})) as flow:
        model.eval()(**prompt())
        model.train()
        with pytest.raises(UnsupportedCall, match=r"stages\.gate: changes in the course of training"):
            model(**prompt())
        with pytest.raises(ValueError, match="progress: expected a number from 0 to 1, got 2"):
            flow.progress = 2
        flow.progress = 0.25
        model(**prompt())
    assert Following.seen == [0.0, 0.25]


def test_a_loss_that_is_no_number_is_refused() -> None:
    class Many(Gate):
        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            return Encode(loss=torch.ones(2).to(call.features[0]))

    model = tiny_llava().train()
    with dropflow.attach(model, policy(gate={"use": Many})), pytest.raises(DecisionError, match=r"loss of .* \(2,\)"):
        model(**prompt())


def test_what_was_learned_is_a_plain_policy_or_refused() -> None:
    use = {"use": "hidrop/concave-pyramid", "keep": {2: 8, 4: 4}, "learn": True, "budget": {"average_tokens": 6}}
    model = tiny_llava()
    with dropflow.attach(model, policy(pyramid=use)) as flow:
        assert dropflow.attach(tiny_llava(), flow.learned_policy()).modules == {}
    with (
        dropflow.attach(model, policy(gate=GATE)) as flow,
        pytest.raises(UnsupportedCall, match=r"learned_policy: stages\.gate: what it has learned is in its weights"),
    ):
        flow.learned_policy()


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_model_that_was_wrapped_before_is_refused() -> None:
    model = freeze_tower(tiny_llava()).train()
    batch = collate([Prompts()[0]])
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    with pytest.raises(UnsupportedModel, match="attach the policy before wrapping"):
        dropflow.attach(wrapped, policy(gate=GATE))
    with (
        dropflow.attach(model, policy(gate=GATE)),
        pytest.raises(UnsupportedCall, match=r"stages\.gate: has a module to train, but the model was wrapped"),
    ):
        wrapped(**batch)
    with dropflow.attach(model, policy(gate=GATE)) as flow:
        wrapped = DistributedDataParallel(model)
        wrapped(**batch).loss.backward()
        assert flow.modules["gate"].weight.grad.abs().max() > 0

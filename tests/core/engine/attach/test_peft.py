"""Low-rank adapters train under a policy, whichever is attached first."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from tiny import HIDROP, policy, tiny_llava
from training import Prompts, collate, trainer
from transformers import AutoModelForImageTextToText
from transformers.integrations.peft import MIN_PEFT_VERSION

import dropflow
from dropflow.backbone import wrapped
from dropflow.errors import UnsupportedCall
from dropflow.testing import MaskedOracle

OLD = Version(peft.__version__) < wrapped.PEFT_CALLS_MODELS
TARGETS = r".*language_model.*(q_proj|k_proj|down_proj)"
BATCH = collate([Prompts()[i] for i in range(4)])


@pytest.fixture(autouse=True)
def _newer_names() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def adapters(dropout: float = 0.0) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, lora_dropout=dropout)


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, adapters(**options))


def attached(order: str) -> tuple[Any, dropflow.Flow]:
    """A model with low-rank adapters and a policy, attached in either order."""
    if order == "adapters injected" and Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers {transformers.__version__} itself injects adapters from PEFT {MIN_PEFT_VERSION} on")
    base = tiny_llava()
    if order == "policy first":
        flow = dropflow.attach(base, HIDROP)
        return adapted(base), flow
    if order == "adapters injected":
        torch.manual_seed(3)
        base.add_adapter(adapters())
        return base, dropflow.attach(base, HIDROP)
    model = adapted(base)
    return model, dropflow.attach(model if order == "adapters first" else model.get_base_model(), HIDROP)


@pytest.mark.skipif(OLD, reason="this PEFT goes past the hooks of the model")
@pytest.mark.parametrize("order", ["policy first", "adapters first", "inner model", "adapters injected"])
def test_gradients_of_the_adapters_equal_the_masked_run(order: str) -> None:
    model, flow = attached(order)
    model.train()
    loss = model(**BATCH).loss
    loss.backward()
    got = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    live = flow.live()
    flow.detach()
    model.zero_grad()
    with MaskedOracle(model, live):
        expected = model(**BATCH, use_cache=False).loss
        expected.backward()
    assert not live.all()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(got) == 6 * 3 * 2
    for name, weight in model.named_parameters():
        if weight.grad is not None and weight.grad.abs().max() > 1e-7:
            assert (got[name] - weight.grad).abs().max() / weight.grad.abs().max() < 1e-3, name


@pytest.mark.skipif(OLD, reason="this PEFT goes past the hooks of the model")
def test_trainer_and_generate_go_through_the_policy_and_the_merged_model_records_it(tmp_path: Path) -> None:
    model, flow = attached("adapters first")
    loop, losses = trainer(model, tmp_path)
    loop.train()
    assert losses.train[-1] < losses.train[0]
    prompt = {name: value[:1] for name, value in BATCH.items() if name != "labels"}
    prompt["pixel_values"] = prompt["pixel_values"][:1]
    model.eval().generate(**prompt, max_new_tokens=2)
    assert flow.report().average_visual_tokens == (16 + 7 * 2 + 2) / 6
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with dropflow.attach(loaded) as again:
        assert again.policy == flow.policy


@pytest.mark.skipif(OLD, reason="this PEFT goes past the hooks of the model")
def test_dropout_of_the_adapters_does_not_decide_what_stays() -> None:
    model = adapted(tiny_llava(), dropout=0.9).train()
    first = policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {0: 7}})  # no layer comes before this keep
    lives, losses = [], []
    with dropflow.attach(model, first) as flow:
        for seed in range(3):
            torch.manual_seed(seed)
            losses.append(model(**BATCH).loss.item())
            lives.append(flow.live()[0])
    assert len(set(losses)) == 3
    assert torch.equal(lives[0], lives[1])
    assert torch.equal(lives[0], lives[2])
    assert {module.training for module in model.modules()} == {True}


def test_an_older_peft_is_refused_where_it_goes_past_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapped, "_peft", lambda: Version("0.20.0"))
    model = adapted(tiny_llava())
    with dropflow.attach(model, HIDROP):
        base = model.get_base_model()
        with pytest.raises(UnsupportedCall, match=r"PEFT 0\.20\.0 calls the forward .* upgrade to peft>=0\.21"):
            base.forward(**BATCH)
        assert base(**BATCH).loss.isfinite()  # the hooks of the model see this call

"""What users do at once on families of today: pictures and videos, padding, beams, chunks, adapters, offload."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from packaging.version import Version
from torch import Tensor

import dropflow
from dropflow.backbone import wrapped
from dropflow.testing import MaskedOracle, tiny_models
from dropflow.testing.case import Case, relative_error
from dropflow.testing.probes import RAGGED, WINDOW
from dropflow.testing.training import labelled

SAMPLES: dict[str, Any] = {
    "qwen3_vl_moe": ((3, "I", 2, "I", 5), (1, "V", 4, "I", 2), (6,)),
    "perception_lm": ((3, "I", 2, "I", 5), (1, "V", 4, "I", 2), (6,)),
    "ovis2": ((3, "I", 2, "I", 5), (1, "I", 2), (6,)),
    "molmo2": ((3, "I", 2, "I", 5), (1, "I", 2), (6,)),
    "molmo2 with videos": ((3, "V", 2, "V", 5), (1, "V", 2), (6,)),
    "glm4v with videos": ((3, "V", 2, "V", 5), (1, "V", 2), (6,)),
}
"""Family, and its batch: two pictures, a video beside a picture where one call takes both, and text alone."""
WHOLE = [name for name in SAMPLES if not name.startswith("glm4v")]
"""Families that transformers itself can run offloaded, and with beams where there are videos."""
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
OLD = Version(peft.__version__) < wrapped.PEFT_CALLS_MODELS
LORA = peft.LoraConfig(r=4, target_modules=r".*layers.*(q_proj|k_proj|v_proj|qkv)", init_lora_weights=False)


def case(name: str, which: dict[str, Any]) -> Case:
    family, tiny = tiny_models()[name.partition(" ")[0]]
    return Case(name, family, tiny, which, samples=SAMPLES[name])


def adapted(model: Any) -> Any:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, LORA)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@torch.no_grad()
@pytest.mark.parametrize("which", [WINDOW, RAGGED], ids=["window", "ragged"])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_padded_batch_of_several_pictures_with_beams_equals_the_masked_run(name: str, which: dict[str, Any]) -> None:
    own = case(name, which)
    assert not own.real.all()
    for beams in (1, 3) if name in WHOLE else (1,):
        how = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams}
        with own.attach() as flow:
            got = own.model.generate(**own.inputs, do_sample=False, **how)
            live = flow.live()[:, ::beams]
            embeds = entered(own).repeat_interleave(beams, 0) if which is RAGGED else None
        assert not live[-1][own.real].all()
        with MaskedOracle(own.model, live, own.adapter, embeds=embeds):
            expected = own.model.generate(**own.inputs, do_sample=False, use_cache=False, **how)
        assert torch.equal(got, expected)


def entered(own: Case) -> Tensor:
    """The embeddings of the prompt, of which an `encode` stage has dropped some."""
    seen: list[Tensor] = []
    text = own.adapter(own.model).text
    handle = text.register_forward_pre_hook(lambda _, __, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    own.model(**own.inputs)
    handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "perception_lm"])
def test_a_prompt_in_chunks_gives_what_it_gives_at_once(name: str) -> None:
    stages = {"in": {"use": "hidrop/late-injection", "at": 1}, "out": {"use": "hidrop/early-exit", "at": 5}}
    own = case(name, {"name": "chunks", "stages": stages}).with_samples([SAMPLES[name][0]])
    with own.attach():
        whole = own.model.generate(**own.inputs, max_new_tokens=4, **GREEDY)
        chunks = own.model.generate(**own.inputs, max_new_tokens=4, **GREEDY, prefill_chunk_size=7)
    assert torch.equal(whole.sequences, chunks.sequences)
    for got, expected in zip(chunks.logits, whole.logits, strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.skipif(OLD, reason="this PEFT goes past the hooks of the model")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5.23 renames the call, 5.20 knows only this name
@pytest.mark.parametrize("name", SAMPLES)
def test_adapters_under_gradient_checkpointing_train_as_in_the_masked_run(name: str) -> None:
    own = case(name, WINDOW)
    inputs = labelled(own)
    model = adapted(own.tiny.model()).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with dropflow.attach(model, WINDOW, adapter=own.adapter) as flow:
        loss = model(**inputs, use_cache=False).loss
        live = flow.live()
        loss.backward()
    got = gradients(model)
    for module in model.modules():
        module.gradient_checkpointing = False
    with MaskedOracle(model, live, own.adapter):
        expected_loss = model(**inputs, use_cache=False).loss
        expected_loss.backward()
    expected = gradients(model)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    decoder = {name: gradient for name, gradient in expected.items() if gradient.abs().max() > 1e-6}
    assert len(decoder) >= 12
    for name, gradient in decoder.items():
        assert (got[name] - gradient).abs().max() / gradient.abs().max() < 1e-3, name


@pytest.mark.skipif(OLD, reason="this PEFT goes past the hooks of the model")
@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_an_offloaded_model_with_adapters_and_beams_equals_the_masked_run_in_memory(name: str) -> None:
    own = case(name, WINDOW)
    model = adapted(own.tiny.model()).eval()
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    assert sum(weight.device.type == "meta" for weight in offloaded.parameters()) > 50
    beams = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with dropflow.attach(offloaded, WINDOW, adapter=own.adapter) as flow:
        got = offloaded.generate(**own.inputs, **beams)
        live = flow.live()[:, ::2]
    with MaskedOracle(model, live, own.adapter):
        expected = model.generate(**own.inputs, **beams, use_cache=False)
    assert torch.equal(got, expected)
    plain = model(**own.inputs).logits
    assert torch.equal(offloaded(**own.inputs).logits, plain)

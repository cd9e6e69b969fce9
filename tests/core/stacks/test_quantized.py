"""Models with quantised weights give under a policy what they give with the dropped tokens masked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from seven import SEVEN, outcome
from tiny import prompt, relative_error, tiny_llava
from training import Prompts, collate
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, QuantoConfig, TorchAoConfig

import dropflow
from dropflow.testing import MaskedOracle

INPUTS = prompt()
DENSE = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
"""What is not quantised."""
EXACT, ROUNDED = 1e-5, 0.05
"""Relative errors: where weights alone are quantised; where activations are, too, whose scales depend on the rest."""


def torchao_weights() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=DENSE)


def torchao_activations() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=DENSE)


def quanto_int8() -> Any:
    return QuantoConfig(weights="int8", modules_to_not_convert=DENSE)


def quanto_int4() -> Any:
    return QuantoConfig(weights="int4", modules_to_not_convert=DENSE)


def bitsandbytes_int8() -> Any:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=DENSE)


def bitsandbytes_nf4() -> Any:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=DENSE)


WAYS: Mapping[Callable[[], Any], tuple[str, float]] = {
    torchao_weights: ("torchao", EXACT),
    torchao_activations: ("torchao", ROUNDED),
    quanto_int8: ("optimum.quanto", EXACT),
    quanto_int4: ("optimum.quanto", EXACT),
    bitsandbytes_int8: ("bitsandbytes", ROUNDED),
    bitsandbytes_nf4: ("bitsandbytes", ROUNDED),
}
"""With the library that each needs, and how near it comes to the masked run."""


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.__name__)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, float]:
    """A model whose decoder layers are quantised, and its tolerance."""
    library, tolerance = WAYS[request.param]
    pytest.importorskip(library, reason="`make test-quantized` brings it")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    folder: Path = tmp_path_factory.mktemp("quantized")
    tiny_llava(width=128, kv_heads=4).save_pretrained(folder)  # sizes that the kernels take
    model = LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=request.param()).eval()
    return model, tolerance


def weights(model: Any) -> dict[str, tuple[type, torch.dtype]]:
    return {name: (type(weight), weight.dtype) for name, weight in model.named_parameters()}


@pytest.mark.timeout(900)  # the first 4-bit test compiles quanto's kernels; one that is stopped leaves a lock behind
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("which", SEVEN)
def test_a_quantised_model_equals_its_masked_run(quantized: tuple[Any, float], which: str) -> None:
    model, tolerance = quantized
    plain = outcome(model, None, INPUTS)
    before = weights(model)
    assert any(kind is not torch.nn.Parameter for kind, _ in before.values())
    found = outcome(model, SEVEN[which], INPUTS)
    with torch.no_grad(), dropflow.attach(model, SEVEN[which]) as flow:
        logits, live, merges = model(**INPUTS).logits, flow.live(), flow.merges()
    assert torch.equal(logits, found.logits)
    assert found.differences(plain) != []
    if which not in ("mustdrop", "visionzip"):  # whose encode stages the oracle knows nothing of
        with torch.no_grad(), MaskedOracle(model, live, merges=merges):
            expected = model(**INPUTS, use_cache=False).logits
        real = INPUTS["attention_mask"].bool()
        assert relative_error(logits[real], expected[real]) < tolerance
    assert weights(model) == before
    assert outcome(model, None, INPUTS).differences(plain) == []


def test_a_4_bit_model_that_trains_keeps_its_packing(tmp_path: Path) -> None:
    """bitsandbytes packs a weight anew for a module that is not in training mode, as ranking by a coming layer once had
    it; what had run before could not be read any more."""
    pytest.importorskip("bitsandbytes", reason="`make test-quantized` brings it")
    tiny_llava(width=128, kv_heads=4).save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=bitsandbytes_nf4()).train()
    batch = collate([Prompts()[number] for number in range(4)])
    query = model.get_decoder().layers[2].self_attn.q_proj
    packed = query.weight.data.clone()
    with dropflow.attach(model, SEVEN["hidrop"]):
        first = model(**batch).loss
        first.backward()
        second = model(**batch).loss
    assert torch.equal(first, second)
    assert query.training
    assert torch.equal(query.weight.data, packed)

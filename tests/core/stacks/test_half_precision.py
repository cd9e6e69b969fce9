"""In half precision a policy keeps what it keeps in float32, also where products of q and k overflow; NaN stays NaN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from seven import SEVEN, outcome
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from torch import Tensor

import dropflow
from dropflow import PruneCall, Stage, hookimpl
from dropflow.engine.model.attention import QueryKey, row_attention
from dropflow.operators import keep_top
from dropflow.testing import MaskedOracle

SEED = 11
"""Of weights under which no two scores at a border are as close as bfloat16 rounds."""
LOUD = 300.0
"""By so much q and k are scaled up, and their products down again: beyond 65504, float16's largest number, between."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float16": 5e-3, "bfloat16": 5e-2}


def loud(dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The same model as ever, but for rounding: scores are right only where products are not taken in float16."""
    model = tiny_llava(seed=SEED, attention=attention)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.self_attn.q_proj.weight *= LOUD
            layer.self_attn.k_proj.weight *= LOUD
            layer.self_attn.scaling /= LOUD**2
    return model.to(dtype)


def inputs_of(dtype: torch.dtype) -> dict[str, Any]:
    inputs = prompt()
    return inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}


@pytest.fixture(scope="module", params=DTYPES)
def half(request: pytest.FixtureRequest) -> Any:
    return loud(DTYPES[request.param])


@pytest.fixture(scope="module")
def wide(half: Any) -> Any:
    """The same weights in float32."""
    return copy.deepcopy(half).float()


@pytest.mark.parametrize("which", SEVEN)
def test_half_precision_keeps_what_float32_keeps(half: Any, wide: Any, which: str) -> None:
    inputs = inputs_of(half.dtype)
    found = outcome(half, SEVEN[which], inputs)
    expected = outcome(wide, SEVEN[which], inputs | {"pixel_values": inputs["pixel_values"].float()})
    assert torch.equal(found.live, expected.live)
    assert found.logits.dtype == half.dtype
    assert torch.isfinite(found.logits).all()


@pytest.mark.parametrize("which", ["hidrop", "pyramiddrop", "fastv", "dart", "sparsevlm"])
@torch.no_grad()
def test_half_precision_equals_its_own_masked_run(half: Any, which: str) -> None:
    inputs = inputs_of(half.dtype)
    with dropflow.attach(half, SEVEN[which]) as flow:
        logits, live, merges = half(**inputs).logits, flow.live(), flow.merges()
    with MaskedOracle(half, live, merges=merges):
        expected = half(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert relative_error(logits[real].float(), expected[real].float()) < TOLERANCE[str(half.dtype)[6:]]


def test_products_of_the_loud_model_overflow_float16() -> None:
    peaks: list[float] = []

    class Peak(Stage[Any]):
        prune_at = (2,)
        taps = (1,)

        @hookimpl
        def prune(self, call: PruneCall) -> None:
            seen = call.tapped(1)
            assert seen.query.dtype == torch.float16
            query, key = seen.query[:, ::2].float(), seen.key.float()
            peaks.append(float((query @ key.transpose(-1, -2)).abs().max()))
            rows = call.attention_rows(1, call.instruction_slots)
            assert torch.isfinite(rows).all()
            assert torch.allclose(rows.float().sum(-1), torch.ones(()), atol=1e-2)

    outcome(loud(torch.float16), policy(peak={"use": Peak}), inputs_of(torch.float16), new_tokens=1)
    assert min(peaks) > torch.finfo(torch.float16).max


def test_rows_are_exact_where_float16_products_are_infinite() -> None:
    dice = torch.Generator().manual_seed(0)
    query, key = (300 * torch.randn(1, heads, 6, 8, generator=dice).half() for heads in (4, 2))
    rows = torch.tensor([[5, 2]])
    layer = QueryKey(query, key, None, 1e-5, causal=True)
    product = query.double() @ key.double().repeat_interleave(2, 1).transpose(-1, -2)
    assert product.abs().max() > 65504
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = (product * 1e-5).masked_fill(~seen, -torch.inf).softmax(-1)[:, :, [5, 2]]
    found = row_attention(layer, rows)
    assert found.dtype == torch.float16
    assert relative_error(found.double(), expected) < 1e-3
    masked = row_attention(QueryKey(query, key, torch.zeros(1, 6, dtype=torch.bool), 1e-5, causal=False), rows)
    assert not masked.any(), "a row that sees nothing, as padding does, is zero"


def poisoned(module: Any, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
    """The states of the first sample are no numbers from here on."""
    return torch.cat((torch.full_like(output[:1], torch.nan), output[1:]))


@torch.no_grad()
def test_states_that_are_not_numbers_rank_by_nothing_else(llava: Any) -> None:
    rows: list[Tensor] = []

    class Reads(Stage[Any]):
        prune_at = (2,)

        @hookimpl
        def prune(self, call: PruneCall) -> None:
            rows.append(call.attention_rows(2, call.instruction_slots))

    with dropflow.attach(llava, policy(reads={"use": Reads})):
        llava(**prompt())
        handle = llava.get_decoder().layers[1].register_forward_hook(poisoned)
        llava(**prompt())
        handle.remove()
    clean, dirty = rows
    assert dirty[0].isnan().all(), "zeros would be a ranking like any other"
    assert torch.equal(dirty[1:], clean[1:])


@pytest.mark.parametrize("which", SEVEN)
def test_a_picture_that_is_not_a_number_harms_its_own_sample_alone(llava: Any, which: str) -> None:
    inputs = prompt()
    clean = outcome(llava, SEVEN[which], inputs)
    inputs["pixel_values"][0] = torch.nan
    plain, dirty = outcome(llava, None, inputs), outcome(llava, SEVEN[which], inputs)
    assert plain.logits[0, -1].isnan().all()
    assert dirty.logits[0, -1].isnan().all()
    assert torch.equal(dirty.tokens[0], plain.tokens[0])
    assert torch.equal(dirty.logits[1:], clean.logits[1:])
    assert torch.equal(dirty.tokens[1:], clean.tokens[1:])
    assert torch.equal(dirty.live[:, 1:], clean.live[:, 1:])
    if which != "mustdrop":  # whose thresholds no NaN passes
        visual = (inputs["input_ids"] == IMAGE)[0]
        assert torch.equal(dirty.live[:, 0, visual].sum(1), clean.live[:, 0, visual].sum(1))


def test_scores_that_are_not_numbers_come_last() -> None:
    nan = torch.nan
    scores = torch.tensor([[nan, 0.2, -5.0, nan, 0.1, nan, nan, 3.0]], dtype=torch.float16)
    image = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]])
    kept = [keep_top(scores, image, [count, 1])[0].nonzero()[:, 0].tolist() for count in range(1, 6)]
    assert kept == [[1, 5], [1, 4, 5], [1, 2, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]]

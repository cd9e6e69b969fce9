"""Attention rows by tap and by probe equal those of the eager model's maps, and the kernels are not changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import policy, prompt, relative_error, tiny_llava

import dropflow
from dropflow import PruneCall, Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.model.attention import QueryKey, row_attention
from dropflow.engine.model.tap import probe


def reader(layer: int, boundary: int, tapped: bool) -> tuple[type[Stage[Any]], list[torch.Tensor]]:
    """A stage that reads attention rows of `layer` at `boundary` and drops nothing."""
    seen: list[torch.Tensor] = []

    class Reader(Stage[Any]):
        prune_at = (boundary,)
        taps = (layer,) if tapped else ()

        @hookimpl
        def prune(self, call: PruneCall) -> None:
            seen.append(call.attention_rows(layer, call.instruction_slots))

    return Reader, seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(("layer", "boundary", "tapped"), [(2, 2, False), (1, 2, True), (4, 5, True)])
@torch.no_grad()
def test_rows_equal_output_attentions(text: str, attention: str, layer: int, boundary: int, tapped: bool) -> None:
    inputs = prompt()
    reader_stage, seen = reader(layer, boundary, tapped)
    model = tiny_llava(text=text, attention=attention)
    with dropflow.attach(model, policy(read={"use": reader_stage})):
        model(**inputs)
    eager = tiny_llava(text=text, attention="eager")
    maps = eager(**inputs, output_attentions=True).attentions[layer]
    last = inputs["input_ids"].shape[1] - 1
    assert seen[0].shape == (3, 4, 1, last + 1)
    real = inputs["attention_mask"].bool()
    for sample in range(3):
        expected = maps[sample, :, last, real[sample]]
        assert relative_error(seen[0][sample, :, 0, real[sample]], expected) < 1e-5


@pytest.mark.parametrize("layer", [2, 1])
@torch.no_grad()
def test_rows_of_a_second_turn_cover_the_first(llava: Any, layer: int) -> None:
    from transformers import DynamicCache

    first, later = prompt([(3, "I", 5)]), prompt([(4, "I", 3)], seed=2)
    reader_stage, seen = reader(layer, 2, layer < 2)
    cache = DynamicCache()
    with dropflow.attach(llava, policy(read={"use": reader_stage})):
        llava(**first, **{CACHE_ARGUMENT: cache})
        mask = torch.ones(1, first["input_ids"].shape[1] + later["input_ids"].shape[1], dtype=torch.long)
        llava(**(later | {"attention_mask": mask}), **{CACHE_ARGUMENT: cache})
    both = {"input_ids": torch.cat((first["input_ids"], later["input_ids"]), 1)}
    both["pixel_values"] = torch.cat((first["pixel_values"], later["pixel_values"]))
    expected = tiny_llava(attention="eager")(**both, output_attentions=True).attentions[layer][0, :, -1]
    assert relative_error(seen[1][0, :, 0], expected) < 1e-5


def test_softcap_window_and_alignment_of_a_kernel_mask() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4)
    rows = torch.tensor([[0, 2]])
    layer = QueryKey(query, key, None, 0.5, causal=True, softcap=2.0, sliding_window=2)
    scores = torch.tanh((query @ key.transpose(-1, -2)) * 0.5 / 2.0) * 2.0
    position, own = torch.arange(5), torch.arange(3) + 2
    seen = (position <= own[:, None]) & (position > own[:, None] - 2)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, :, [0, 2]]
    assert relative_error(row_attention(layer, rows), expected) < 1e-6
    hidden = torch.tensor([[1, 0, 1, 1, 1]])
    masked = row_attention(QueryKey(query, key, hidden, 0.5, causal=False), rows)
    assert masked[..., 1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 3, 16).to(dtype), torch.randn(1, 1, 50, 16).to(dtype)
    rows, scale = torch.tensor([[0, 2]]), 0.25
    found = row_attention(QueryKey(query, key, None, scale, causal=False), rows)
    exact = (query.double() @ key.double().transpose(-1, -2) * scale).softmax(-1)[:, :, [0, 2]]
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= exact * torch.finfo(dtype).eps).all()


def test_products_beyond_half_precision_are_finite() -> None:
    query, key = torch.full((1, 1, 1, 8), 200.0).half(), torch.full((1, 1, 3, 8), 200.0).half()
    key[0, 0, 1] = 201.0  # q k is 320,000 and more, where float16 ends at 65,504
    found = row_attention(QueryKey(query, key, None, 8**-0.5, causal=False), torch.tensor([[0]]))
    assert found[0, 0, 0].tolist() == [0.0, 1.0, 0.0]


def test_rows_that_see_nothing_are_zero_and_nan_stays_nan() -> None:
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    hidden = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    assert row_attention(QueryKey(query, key, hidden, 0.5, causal=False), torch.tensor([[0, 1]])).abs().max() == 0
    key[0, 0, 1] = torch.nan
    assert row_attention(QueryKey(query, key, None, 0.5, causal=False), torch.tensor([[0]])).isnan().all()


def test_a_layer_that_bypasses_the_interface_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="without looking up its attention"):
        probe("sdpa", lambda: None)


@torch.no_grad()
def test_selection_allocates_no_square_map() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model, inputs = tiny_llava(grid=14, kv_heads=4), prompt([(8, "I", 40)], grid=14)
    tokens = inputs["input_ids"].shape[1]
    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest[0] = max(largest[0], output.numel())
            return output

    # one square map would be larger than anything of width 99 (the vocabulary)
    assert tokens**2 > tokens * 99
    with dropflow.attach(model, policy(p={"use": "hidrop/concave-pyramid", "keep": {2: 50, 3: 10}})), Largest():
        model(**inputs)
    assert largest[0] < tokens**2

"""VTW: the withdrawal, and its layer search against a recorded search of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llm_goldens import golden, recorded_llama
from tiny import policy, prompt, relative_error
from transformers import DynamicCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow_vtw import divergence, find_boundary, first_within, last_logits

RECORD = golden("vtw_findk")
IMAGE = slice(35, 611)


@pytest.fixture(scope="module")
def searched() -> Any:
    weights = {key.removeprefix("w/"): value for key, value in RECORD.items() if key.startswith("w/")}
    return recorded_llama(16, int(RECORD["heads"]), weights, layers=8, intermediate_size=24, vocab_size=24)


@torch.no_grad()
def test_the_search_sees_the_recorded_logits_and_divergences(searched: Any) -> None:
    first, found = int(RECORD["first_candidate"]), []
    candidates = range(first, 8)
    for sample, embeds in enumerate(RECORD["inputs_embeds"]):
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        visual[:, IMAGE] = True
        inputs = {"inputs_embeds": embeds}
        dense = last_logits(searched, inputs)
        assert relative_error(dense, RECORD["full_last_logits"][sample, 0]) < 2e-4
        withdrawn = [last_logits(searched, inputs, at, visual) for at in candidates]
        if sample == 1:
            expected = RECORD["sample1_withdrawn_last_logits"][:, 0]
            assert all(relative_error(a, b) < 2e-4 for a, b in zip(withdrawn, expected, strict=True))
        found.append(torch.stack([divergence(dense, logits) for logits in withdrawn]))
        assert relative_error(found[-1], RECORD["kl_per_sample"][sample].float()) < 1e-3
    means = torch.stack(found).mean(0)
    assert relative_error(means, RECORD["kl_mean"].float()) < 1e-3
    assert first_within(list(candidates), means.tolist(), 0.0239) == 6
    assert first_within(list(candidates), means.tolist(), 0.003) is None
    assert first_within(list(candidates), means.tolist(), 1.0) == 5


def test_the_divergence_is_kl_of_the_withdrawn_against_the_dense_run() -> None:
    dense, withdrawn = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double()
    p, q = withdrawn.softmax(-1), dense.softmax(-1)
    expected = float((p * (p / q).log()).sum())
    assert float(divergence(dense, withdrawn)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(withdrawn, dense)) != pytest.approx(expected, rel=1e-2)
    assert float(divergence(dense, dense)) == 0


@torch.no_grad()
def test_a_search_on_prompts_with_images(llava: Any) -> None:
    samples = [prompt([(3, "I", 5)], seed=seed) for seed in (1, 2)]
    found = find_boundary(llava, samples, threshold=1e9, candidates=(2, 4, 6))
    assert list(found.divergences) == [2, 4, 6]
    assert found.boundary == 2
    assert found.divergences[6] == 0, "withdrawing after the last layer changes nothing"
    expected = 0.0
    for inputs in samples:
        with dropflow.attach(llava, policy(gone={"use": "hidrop/early-exit", "at": 4})):
            gone = llava(**inputs).logits[0, -1].softmax(-1)
        expected += float((gone * (gone / llava(**inputs).logits[0, -1].softmax(-1)).log()).sum()) / 2
    assert found.divergences[4] == pytest.approx(expected, rel=1e-3)
    assert find_boundary(llava, samples[:1], threshold=-1.0).divergences.keys() == {5}
    assert find_boundary(llava, samples[:1], threshold=-1.0).boundary is None


def test_a_search_that_cannot_be_done_says_so(llava: Any) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        find_boundary(llava, [])
    with pytest.raises(ValueError, match=r"candidates from 0 to 6, got \[7\]"):
        find_boundary(llava, [prompt([(3, "I", 5)])], candidates=[7])
    with pytest.raises(ValueError, match=r"one prompt without padding.*\(3, "):
        find_boundary(llava, [prompt()])


@torch.no_grad()
def test_states_in_front_of_the_boundary_are_the_dense_ones_and_caches_hold_text_behind_it(llava: Any) -> None:
    inputs, cache, states = prompt([(3, "I", 5)]), DynamicCache(), []
    layer = llava.get_decoder()._modules["layers"][2]
    handle = layer.register_forward_hook(lambda _, __, output: states.append(output))
    llava(**inputs)
    with dropflow.attach(llava, policy(withdraw={"use": "vtw/withdrawal", "at": 3})) as flow:
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        visual = [layer.visual_tokens for layer in flow.report().layers]
    handle.remove()
    assert torch.equal(states[0], states[1])
    assert [held.keys.shape[-2] for held in cache.layers] == [25] * 3 + [9] * 3
    assert visual == [16] * 3 + [0] * 3


@torch.no_grad()
def test_withdrawal_at_the_depth_is_the_dense_model(llava: Any) -> None:
    inputs = prompt()
    with dropflow.attach(llava, policy(withdraw={"use": "vtw/withdrawal", "at": 6})):
        flowing = llava(**inputs).logits
    assert torch.equal(flowing, llava(**inputs).logits)


@torch.no_grad()
def test_withdrawal_is_pruning_to_nothing(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    logits = []
    for stage in ({"use": "vtw/withdrawal", "at": 2}, {"use": "fastv/attention-rank", "at": 2, "keep": 0}):
        with dropflow.attach(llava, policy(stage=stage)):
            logits.append(llava(**inputs).logits[0, -1])
    assert relative_error(*logits) < 1e-5

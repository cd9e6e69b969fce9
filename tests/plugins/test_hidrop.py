"""HiDrop's stages against the paper's numbers and independent statements of their rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HIDROP, policy, prompt, relative_error, tiny_llava
from transformers import DynamicCache
from watching import told, watched

import dropflow
from dropflow import Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import PolicyError
from dropflow.policy.plan import resolve
from dropflow.units import BackboneShape
from dropflow_hidrop.topk import soft_mask


@pytest.mark.parametrize("text", ["llama", "mistral"])
@torch.no_grad()
def test_scores_are_the_last_prompt_row_of_the_boundarys_own_attention(text: str) -> None:
    """The score at r equals, entry by entry, what layer r would show if nothing were dropped there."""
    inputs = prompt([(3, "I", 5)])
    model = tiny_llava(text=text)
    stages = {"inject": {"use": "hidrop/late-injection", "at": 1}}
    pyramid = {"use": "hidrop/concave-pyramid", "keep": {3: 6}}
    with dropflow.attach(model, watched(**stages, pyramid=pyramid)) as flow:
        model(**inputs)
        event = told(flow)[-1]
        kept = flow.live()[3, 0, 4:20].nonzero()[:, 0]
    assert event.boundary == 3

    eager = tiny_llava(text=text, attention="eager")
    maps: dict[int, torch.Tensor] = {}

    class Reads(Stage[Any]):
        prune_at = (4,)
        taps = (2, 3)

        @hookimpl
        def prune(self, call: dropflow.PruneCall) -> None:
            maps.update({layer: call.attention_rows(layer, call.instruction_slots) for layer in self.taps})

    with dropflow.attach(eager, policy(**stages, read={"use": Reads})):
        eager(**inputs)
    expected = maps[3][0, :, 0].mean(0)
    assert relative_error(event.scores["pyramid"][0], expected) < 1e-5
    assert relative_error(event.scores["pyramid"][0], maps[2][0, :, 0].mean(0)) > 0.1  # a layer early is another thing
    assert kept.tolist() == sorted(torch.topk(expected[4:20], 6).indices.tolist())


@torch.no_grad()
def test_position_ids_that_layers_get_are_the_original_ones(llava: Any) -> None:
    seen: list[list[int]] = []
    layers = llava.get_decoder()._modules["layers"]
    handles = [
        layer.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
        )
        for layer in layers
    ]
    inputs = prompt([(3, "I", 5)])
    with dropflow.attach(llava, HIDROP) as flow:
        llava(**inputs)
        live = flow.live()[:, 0]
    for handle in handles:
        handle.remove()
    text = [*range(4), *range(20, 25)]
    assert seen[0] == text
    assert seen[1] == list(range(25))
    assert seen[2] == live[2].nonzero()[:, 0].tolist()
    assert len(seen[2]) == 16
    assert seen[5] == text


@torch.no_grad()
def test_states_at_the_first_filter_do_not_depend_on_the_question(llava: Any) -> None:
    states, kept = [], []
    layer = llava.get_decoder()._modules["layers"][1]
    handle = layer.register_forward_hook(lambda _, __, output: states.append(output[0, 4:20]))
    for seed in (1, 2):
        inputs = prompt([(3, "I", 5)])
        inputs["input_ids"][0, 20:] = torch.randint(3, 97, (5,), generator=torch.Generator().manual_seed(seed))
        with dropflow.attach(llava, HIDROP) as flow:
            llava(**inputs)
            kept.append(flow.live()[2, 0])
    handle.remove()
    assert torch.equal(states[0], states[1])
    assert not torch.equal(kept[0], kept[1])


@torch.no_grad()
def test_cache_lengths_on_thirty_two_layers() -> None:
    """Sixty text tokens, 48 average visual tokens: the KV table of the published 7B setting."""
    model, inputs = tiny_llava(layers=32, grid=24), prompt([(34, "I", 25)], grid=24)
    cache = DynamicCache()
    with dropflow.attach(model, "hidrop-48") as flow:
        model(**inputs, **{CACHE_ARGUMENT: cache})
        report = flow.report()
    text = 60
    visual = [0] * 8 + [576] * 2 + [87] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 8
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert lengths == [text + n for n in visual]
    assert sum(lengths) == 3456
    assert report.average_visual_tokens == 48
    assert report.kv_bytes / report.kv_bytes_dense == pytest.approx(3456 / 20352)


@torch.no_grad()
def test_each_image_is_pruned_by_its_own_count(llava: Any) -> None:
    inputs = prompt([("I", 2, "I", 9), (4, "I", 3)])
    with dropflow.attach(llava, HIDROP) as flow:
        cache = DynamicCache()
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        visual = [(live & (inputs["input_ids"] == 98)).sum(1).tolist() for live in flow.live()]
        first = inputs["input_ids"][0] == 98
        halves = [flow.live()[2, 0][first][:16].sum().item(), flow.live()[2, 0][first][16:].sum().item()]
    assert visual == [[0, 0], [32, 16], [14, 7], [14, 7], [4, 2], [0, 0]]
    assert halves == [7, 7]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [12 + n for n in (0, 32, 14, 14, 4, 0)]


@torch.no_grad()
def test_reference_selection_keeps_tie_groups(llava: Any) -> None:
    """An image of identical patches ties everywhere but for position, so scores are made equal by a flat image."""
    inputs = prompt([(3, "I", 5)])
    tied = {"inject": {"use": "hidrop/late-injection", "at": 2}}
    counts = {}
    for select in ("exact", "reference"):
        pyramid = {"use": "hidrop/concave-pyramid", "keep": {2: 5}, "select": select}
        with dropflow.attach(llava, policy(**tied, pyramid=pyramid)) as flow:
            embeds = llava.get_input_embeddings()(inputs["input_ids"])
            positions = torch.arange(25)[None].clone()
            positions[0, 4:20] = 4  # no RoPE difference between the visual tokens
            embeds[0, 4:20] = 0.3
            with flow.visual(inputs["input_ids"] == 98):
                llava(inputs_embeds=embeds, position_ids=positions, attention_mask=inputs["attention_mask"])
            counts[select] = (flow.live()[2, 0] & (inputs["input_ids"][0] == 98)).nonzero()[:, 0].tolist()
    assert counts["exact"] == [4, 5, 6, 7, 8]
    assert counts["reference"] == list(range(4, 20))


def test_the_published_soft_mask() -> None:
    expected = [0.0025, 0.0067, 0.0180, 0.0474, 0.1192, 0.2689, 0.5000, 0.7311, 0.8808, 0.9526]
    mask = soft_mask(torch.arange(10.0), 3)
    assert mask.tolist() == pytest.approx(expected, abs=5e-5)
    assert (mask > 0.5).nonzero()[:, 0].tolist() == [7, 8, 9]
    tied = soft_mask(torch.tensor([0.1, 0.2, 0.2, 0.2, 0.9]), 2)
    assert (tied > 0.5).nonzero()[:, 0].tolist() == [1, 2, 3, 4]
    assert (soft_mask(torch.tensor([0.3]), 1) > 0.5).all()


def test_a_window_alone_averages_half() -> None:
    stages = {"inject": {"use": "hidrop/late-injection", "at": 8}, "exit": {"use": "hidrop/early-exit", "at": 24}}
    plan = resolve(dropflow.load_policy(policy(**stages)), BackboneShape(32, 576))
    assert plan.schedule().average == 288


@pytest.mark.parametrize(
    ("shape", "at", "keep", "average", "first"),
    [
        ((32, 576), (8, 24), {10: "solve", 14: 10, 16: 5, 18: 1}, 48, 87),
        ((32, 576), (8, 24), {10: "solve", 14: 10, 16: 5, 18: 1}, 64, 215),
        ((32, 576), (8, 24), {10: "solve", 14: 10, 16: 5, 18: 1}, 80, 343),
        ((32, 576), (14, 27), {16: "solve", 19: 10, 22: 5, 25: 1}, 64, 283),
        ((32, 576), (8, 24), {10: "solve", 13: 10, 16: 5, 19: 1}, 48, 112),
        ((32, 576), (8, 24), {10: "solve", 13: 10, 16: 5, 19: 1}, 80, 453),
    ],
)
def test_a_budget_solves_the_first_keep(
    shape: tuple[int, int], at: tuple[int, int], keep: dict[int, Any], average: float, first: int
) -> None:
    which = policy(
        inject={"use": "hidrop/late-injection", "at": at[0]},
        pyramid={"use": "hidrop/concave-pyramid", "keep": keep, "budget": {"average_tokens": average}},
        exit={"use": "hidrop/early-exit", "at": at[1]},
    )
    solved = resolve(dropflow.load_policy(which), BackboneShape(*shape)).schedule()
    assert solved.per_layer[min(keep)] == first
    assert solved.average == pytest.approx(average, abs=0.1)


@pytest.mark.parametrize(
    ("pyramid", "message"),
    [
        ({"keep": {3: "solve", 4: 1}}, r"stages\.pyramid\.budget: missing"),
        (
            {"keep": {3: 5, 4: "solve"}, "budget": {"average_tokens": 3}},
            r"only the first boundary \(3\) can be `solve`",
        ),
        ({"keep": {3: "solve", 4: 1}, "budget": {"average_tokens": 90}}, r"needs a first keep of \d+, not in 1\.\.16"),
        ({"keep": {0.5: 4, 3: 2}}, r"stages\.pyramid\.keep\.3: boundary 3 is named twice on a model of 6 layers"),
    ],
)
def test_a_pyramid_that_makes_no_sense_is_refused(pyramid: dict[str, Any], message: str) -> None:
    which = policy(pyramid={"use": "hidrop/concave-pyramid", **pyramid})
    with pytest.raises(PolicyError, match=message):
        resolve(dropflow.load_policy(which), BackboneShape(6, 16))


def test_solving_needs_a_layer_with_vision_after_the_first_boundary() -> None:
    stages = {
        "pyramid": {"use": "hidrop/concave-pyramid", "keep": {5: "solve"}, "budget": {"average_tokens": 3}},
        "exit": {"use": "hidrop/early-exit", "at": 5},
    }
    with pytest.raises(PolicyError, match=r"^stages\.pyramid\.budget\.average_tokens: no layer with vision follows"):
        resolve(dropflow.load_policy(policy(**stages)), BackboneShape(6, 16))

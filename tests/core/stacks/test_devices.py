"""A model whose parts lie on two devices gives, under a policy, what it gives on one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from seven import OFTEN, SEVEN, Outcome, outcome
from tiny import HIDROP, RAGGED, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from training import Prompts, collate, freeze_tower
from two_devices import HOST, SECOND, There, TwoDevices, spread

import dropflow
from dropflow import Keep, PruneCall, Stage, hookimpl
from dropflow.engine.model.attention import QueryKey, attend, row_attention
from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.masks import causal_mask, continued_mask, gather_mask
from dropflow.engine.tokens.restricting import restrict
from dropflow.operators import keep_top
from dropflow.testing import Tiny, tiny_models
from dropflow.testing.families.tiny import SAMPLES

INPUTS = prompt()
TEXT, TOWER = "model.language_model", "model.vision_tower"
LAYERS = [f"{TEXT}.layers.{number}" for number in range(6)]
BLOCKS = [TOWER, "model.multi_modal_projector", f"{TEXT}.embed_tokens", *LAYERS, f"{TEXT}.norm", "lm_head"]
SPREADS: Mapping[str, list[str]] = {
    "halves": [*LAYERS[3:], f"{TEXT}.norm", "lm_head"],
    "to and fro": [TOWER, *LAYERS[2:4], f"{TEXT}.norm"],
    "layer by layer": [*LAYERS[1::2], "lm_head"],
    "decoder apart": [f"{TEXT}.embed_tokens", *LAYERS, f"{TEXT}.norm", "lm_head"],
    "tower apart": [TOWER],
    "ends apart": [f"{TEXT}.embed_tokens", f"{TEXT}.norm"],
}
"""What lies on the second device."""
TOWER_APART = Version(transformers.__version__) >= Version("5.23")
"""Older models lose the type of what a vision encoder on another device returns, with or without a policy."""


def map_of(there: list[str], blocks: list[str]) -> dict[str, torch.device]:
    return {block: SECOND if block in there else HOST for block in [*blocks, f"{TEXT}.rotary_emb"]}


@pytest.fixture(scope="module", params=SPREADS)
def split(request: pytest.FixtureRequest) -> Any:
    if TOWER in SPREADS[request.param] and not TOWER_APART:
        pytest.skip("this transformers cannot run with its vision encoder on another device")
    return spread(freeze_tower(tiny_llava()), map_of(SPREADS[request.param], BLOCKS))


@pytest.fixture(scope="module")
def whole() -> Any:
    return freeze_tower(tiny_llava())


@pytest.fixture(scope="module")
def expected(whole: Any) -> dict[str, Outcome]:
    return {name: outcome(whole, which, INPUTS) for name, which in (*SEVEN.items(), ("plain", None))}


@pytest.mark.parametrize("which", [*OFTEN, "plain"])
def test_a_model_on_two_devices_gives_what_it_gives_on_one(
    split: Any, expected: dict[str, Outcome], which: str
) -> None:
    with TwoDevices():
        found = outcome(split, SEVEN.get(which), INPUTS)
    assert found.differences(expected[which]) == []


def step(model: Any, which: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its gradients."""
    batch = collate([Prompts()[number] for number in range(4)])
    with dropflow.attach(model.train(), which):
        loss = model(**batch).loss
        loss.backward()
    model.eval()
    gradients = {name: w.grad.as_subclass(Tensor) for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return loss.detach().as_subclass(Tensor), gradients


@pytest.mark.parametrize("which", ["hidrop", "mustdrop", "soft"])
def test_a_model_on_two_devices_learns_what_it_learns_on_one(split: Any, whole: Any, which: str) -> None:
    soft = {"use": "hidrop/concave-pyramid", "keep": {2: 7, 4: 2}, "select": "soft"}
    chosen = policy(pyramid=soft) if which == "soft" else SEVEN[which]
    with TwoDevices():
        loss, gradients = step(split, chosen)
    expected_loss, expected = step(whole, chosen)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.skipif(not TOWER_APART, reason="this transformers cannot run with its vision encoder on another device")
@torch.no_grad()
def test_beams_and_losses_of_answers_cross_devices(whole: Any) -> None:
    split = spread(tiny_llava(), map_of(SPREADS["to and fro"], BLOCKS))
    budget = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    labels = INPUTS["input_ids"].masked_fill(INPUTS["attention_mask"] == 0, -100)
    with dropflow.attach(whole, RAGGED):
        expected = whole.generate(**INPUTS, **budget), whole(**INPUTS, labels=labels).loss
    with TwoDevices(), dropflow.attach(split, RAGGED):
        found = split.generate(**INPUTS, **budget), split(**INPUTS, labels=labels).loss
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@torch.no_grad()
def test_a_stage_reads_layers_and_embeddings_of_the_other_device(whole: Any) -> None:
    class Reads(Stage[Any]):
        """Ranks by the keys of two earlier layers, an attention row, the last norm and what entered the decoder."""

        prune_at = (4,)
        taps = (2, 3)

        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            assert call.final_norm is not None
            keys = (call.keys(2) + call.keys(3)).sum((1, 3))
            row = call.attention_rows(3, call.instruction_slots).mean(1)[:, 0, -call.index.shape[1] :]
            entered = call.entry.embeds.gather(1, call.index[:, :, None].expand_as(call.hidden)).sum(2)
            states = call.final_norm(call.hidden).to(call.hidden.device).sum(2)
            scores = keys + row + entered + states
            return Keep(keep_top(scores, call.image_id, [5] * len(call.image_sizes)), scores)

    which = policy(reads={"use": Reads})
    split = spread(tiny_llava(), map_of([LAYERS[2], f"{TEXT}.norm"], BLOCKS))
    with TwoDevices():
        found = outcome(split, which, INPUTS)
    assert found.differences(outcome(whole, which, INPUTS)) == []


def family(name: str) -> Tiny:
    return tiny_models()[name][1]


def test_a_tower_whose_layers_lie_on_two_devices() -> None:
    tiny = family("paligemma")
    inputs, _ = tiny.prompt(SAMPLES, side="left")
    tower = "model.vision_tower"
    blocks = [
        *(f"{tower}.{part}" for part in ("embeddings", *(f"encoder.layers.{n}" for n in range(3)), "post_layernorm")),
        *("model.multi_modal_projector", TEXT, "lm_head"),
    ]
    split = spread(
        tiny.model(), {block: SECOND if block.endswith(("layers.1", "projector")) else HOST for block in blocks}
    )
    merging = policy(merge={"use": "mustdrop/spatial-merge", "at": 2, "window": [2, 2], "threshold": 0.0})
    for which in (merging, MUSTDROP_KEYS, SEVEN["visionzip"]):
        with TwoDevices():
            found = outcome(split, which, inputs)
        assert found.differences(outcome(tiny.model(), which, inputs)) == []


MUSTDROP_KEYS = policy(
    keys={"use": "mustdrop/key-set", "share": 0.2}, pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 0.4}}
)


def test_deepstack_features_reach_layers_of_the_other_device() -> None:
    tiny = family("qwen3_vl")
    inputs, _ = tiny.prompt(SAMPLES, side="left")
    parts = ["model.visual", *(f"{TEXT}.{part}" for part in ("embed_tokens", "norm", "rotary_emb")), "lm_head"]
    split = spread(tiny.model(), dict.fromkeys(parts, HOST) | dict.fromkeys(LAYERS, SECOND))
    for which in (HIDROP, RAGGED):
        with TwoDevices():
            found = outcome(split, which, inputs)
        assert found.differences(outcome(tiny.model(), which, inputs)) == []


def test_the_second_device_mixes_with_none() -> None:
    here = torch.arange(6.0).view(2, 3)
    with TwoDevices():
        there = here.to(SECOND)
        assert isinstance(there, There)
        assert (there.device, here.device, (there + 1).device) == (SECOND, HOST, SECOND)
        assert torch.zeros(2, device=there.device).device == SECOND
        assert torch.equal(there.to(HOST), here)
        assert torch.equal(there[torch.tensor([1])].cpu(), here[1:])
        mixed = [
            lambda: there + here,
            lambda: torch.cat((there, here)),
            lambda: here[there[0].long()],
            lambda: there.gather(1, here.long()),
            lambda: torch.nn.functional.linear(here, there),
            lambda: here.masked_fill(there > 1, 0),
        ]
        for mix in mixed:
            with pytest.raises(RuntimeError, match="same device, found two"):
                mix()


META = torch.device("meta")


def test_rows_and_masks_land_on_the_device_of_the_queries() -> None:
    """The meta device refuses to mix by itself; nothing can be moved off it, so the queries lie there."""
    query, key = torch.randn(2, 4, 6, 8, device=META), torch.randn(2, 2, 6, 8)
    rows = torch.tensor([[5, 3], [5, 4]])
    masks = [None, torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 1, 6, 6).tril().bool(), torch.zeros(1, 1, 6, 6)]
    for mask in masks:
        seen = row_attention(QueryKey(query, key, mask, 0.3, causal=True, sliding_window=3), rows)
        assert (seen.device, seen.shape) == (META, (2, 4, 2, 6))
        apart = attend(QueryKey(query, key, mask, 0.3, causal=True), query[:, :, :2], rows)
        assert (apart.device, apart.shape) == (META, (2, 4, 2, 6))


def test_masks_states_and_arguments_are_fitted_where_they_lie() -> None:
    live = LiveSet.of(torch.tensor([[True, False, True, True], [False, False, False, True]]))
    keys = KeyIndex.plain(2, 2, HOST).followed_by(live, torch.full((2, 4), -1))
    full = torch.ones(2, 1, 4, 6, dtype=torch.bool).tril(2)
    states = torch.randn(2, 4, 8)
    whole = LiveSet.whole(2, 4, HOST)
    with TwoDevices():
        for mask in (full, torch.where(full, 0.0, -1e9), full[:, 0, -1].long()):
            flash = mask.dim() == 2
            gathered = gather_mask(mask.to(SECOND), live, keys, flash=flash)
            assert gathered is not None
            assert gathered.device == SECOND
            assert torch.equal(gathered.cpu(), known(gather_mask(mask, live, keys, flash=flash)))
            longer = torch.nn.functional.pad(mask, (0, 1), value=1)
            continued = continued_mask(longer.to(SECOND), keys, 6, 1, flash=flash)
            assert continued is not None
            assert torch.equal(continued.cpu(), known(continued_mask(longer, keys, 6, 1, flash=flash)))
        assert causal_mask(live, keys).device == HOST
        moved = live.restrict(whole, states.to(SECOND), None)
        assert torch.equal(moved.cpu(), live.restrict(whole, states, None))
        assert torch.equal(live.expand(moved).cpu(), live.expand(moved.cpu()))
        assert torch.equal(live.take(states.to(SECOND)).cpu(), live.take(states))
        late = whole.restrict(live, moved, states)
        assert torch.equal(late.cpu(), whole.restrict(live, moved.cpu(), states))
        positions = torch.arange(4).expand(2, -1)
        cut = restrict("position_ids", positions.to(SECOND), live, {})
        assert torch.equal(cut.cpu(), restrict("position_ids", positions, live, {}))


def known(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask

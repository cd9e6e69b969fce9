"""VisionPulse: recorded decisions, what the rule promises, and what the released code got wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from goldens_2026 import golden
from hypothesis import given
from hypothesis import strategies as st
from llm_goldens import stage_of
from method_goldens import FEW
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import DynamicCache

import dropflow
from dropflow import CacheSelect, CacheView, StepCall
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.model.attention import QueryKey, attend, last_logits
from dropflow.errors import PolicyError
from dropflow.policy.plan import resolve
from dropflow.testing import assert_stage_conforms, tiny_models
from dropflow.units import BackboneShape
from dropflow_visionpulse import DecodeRead
from dropflow_visionpulse.rules import Budget, best_blocks, by_block, by_importance, by_mass

STAGE = "visionpulse/decode-read"
CASES = ("5pct", "mass_between", "one_visual", "text_dominates")
HALF = {"use": STAGE, "at": 2, "tau": 0.4, "budget_min": 0.3, "budget_max": 0.5}
TOKENS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def step_call(logits: Tensor, visual: Tensor, valid: Tensor | None = None, layer: int = 3) -> StepCall:
    """A payload in which `visual` entries (batch, keys) may be parked."""
    valid = torch.ones_like(visual) if valid is None else valid
    index = torch.arange(visual.shape[1]).expand_as(visual)
    image = torch.where(visual, 0, -1)
    view = CacheView(layer, index, valid, image, torch.zeros_like(visual), layer, None)
    return StepCall(1, view, 1, lambda: logits)


def answered(call: StepCall, **options: Any) -> CacheSelect:
    found: CacheSelect = stage_of(DecodeRead, layers=6, at=3, **options).decode_cache(call)
    return found


def options_of(meta: dict[str, Any]) -> dict[str, Any]:
    return {name: meta[name] for name in ("tau", "budget_min", "budget_max")} | {"fixed": meta.get("fixed")}


def attention(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> QueryKey:
    return QueryKey(query, key, mask, scaling=scale, causal=False)


def drawn(seed: int, batch: int = 2, keys: int = 60, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    visual = (torch.arange(keys) >= 5) & (torch.arange(keys) < keys - 7)
    return torch.randn(batch, 4, keys, generator=dice) * spread, visual.expand(batch, -1)


@pytest.mark.parametrize("case", CASES)
def test_recorded_decisions_and_what_follows_from_them(case: str) -> None:
    recorded = golden(f"pulse_{case}")
    meta, visual, bias = recorded["meta"], recorded["visual"], recorded["bias"][:, None, None]
    seen = attention(recorded["query"], recorded["key"], bias, meta["scale"])
    active = answered(step_call(last_logits(seen), visual), **options_of(meta)).active & visual
    if meta["rank_margin"][0] == 0:
        assert active.sum(1).tolist() == meta["kept"]
        return
    assert torch.equal(active, recorded["out_kept"])
    rows = torch.zeros(1, 1, dtype=torch.long)
    parked = bias.masked_fill((visual & ~active)[:, None, None], -torch.inf)
    for place, mask, weights in (
        ("", parked, "out_anchor_weights"),
        ("_behind", parked, "out_behind_weights"),
        ("_behind", bias, None),
    ):
        layer = attention(recorded[f"query{place}"], recorded[f"key{place}"], mask, meta["scale"])
        own = attend(layer, layer.query, rows)[:, :, 0]
        value = recorded[f"value{place}"].repeat_interleave(4 // recorded["value"].shape[1], 1)
        output = torch.einsum("bhk,bhkd->bhd", own, value)[:, None]
        name = "out_before" if weights is None else weights.removesuffix("_weights")
        torch.testing.assert_close(output, recorded[name], rtol=1e-4, atol=1e-5)
        if weights is not None:
            torch.testing.assert_close(own, recorded[weights], rtol=1e-4, atol=1e-5)


def test_six_recorded_steps_of_a_growing_cache() -> None:
    recorded = golden("pulse_steps_a")
    meta = recorded["meta"]
    for step, query in enumerate(recorded["queries"]):
        keys = meta["prompt"] + step + 1
        visual = torch.zeros(1, keys, dtype=torch.bool)
        visual[:, meta["first"] : meta["first"] + meta["visual"]] = True
        seen = attention(query[None, :, None], recorded["key"][:, :, :keys], None, meta["scale"])
        active = answered(step_call(last_logits(seen), visual), **options_of(meta)).active
        assert torch.equal(active[visual], recorded["out_kept"][step]), step


@pytest.mark.parametrize("case", ["counts_5", "counts_13"])
def test_recorded_counts(case: str) -> None:
    """The product of share and number is cut off in float32: 0.13 of 900 is 116."""
    recorded = golden(f"pulse_{case}")
    ratio = recorded["meta"]["ratio"]
    for total, kept in zip(recorded["visual"].tolist(), recorded["out_kept"].tolist(), strict=True):
        visual = torch.ones(1, total + 1, dtype=torch.bool)
        visual[:, -1] = False
        call = step_call(torch.zeros(1, 2, total + 1), visual)
        for own in ({"budget_min": ratio, "budget_max": ratio}, {"fixed": ratio}):
            assert int((answered(call, **own).active & visual).sum()) == kept


def test_recorded_blocks() -> None:
    recorded = golden("pulse_blocks_a")
    meta = recorded["meta"]
    budget = Budget(0.4, meta["budget_min"], meta["budget_max"])
    weights, prunable = recorded["block_scores"], recorded["out_prunable"]
    kept = best_blocks(weights, prunable, torch.tensor(meta["visual"]), budget, meta["block"])
    assert torch.equal(kept | ~prunable, recorded["out_kept_blocks"])
    visual, blocks = recorded["visual"], weights.shape[2]
    logits = (weights.log() * 0.4).repeat_interleave(16, 2)[:, :, : visual.shape[1]]
    active = answered(step_call(logits, visual), variant="blocks", block=16, tau=0.4, budget_min=0.05, budget_max=0.1)
    expected = recorded["out_kept_blocks"].repeat_interleave(16, 1)[:, : visual.shape[1]]
    assert torch.equal(active.active, expected)
    assert active.from_layer == 4
    assert blocks == 21


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("port_mass", {"tau": 0.4, "budget_min": 0.0, "budget_max": 0.3}),
        ("port_top_p2", {"tau": 0.2, "budget_min": 0.0, "budget_max": 1.0, "top_p": 0.95}),
    ],
)
def test_recorded_decisions_of_the_other_port(case: str, options: dict[str, Any]) -> None:
    recorded = golden(f"pulse_{case}")
    visual = recorded["visual"][None]
    key = recorded["key"].transpose(0, 1)[None]
    seen = attention(recorded["query"][None, :, None], key, None, recorded["meta"]["softmax_scale"])
    answer = answered(step_call(last_logits(seen), visual), variant="port", **options)
    assert answer.active[visual].nonzero()[:, 0].tolist() == sorted(recorded["out_kept"].tolist())
    assert answer.from_layer == 4
    weights = (last_logits(seen) / options["tau"]).softmax(2).mean(1)[visual]
    torch.testing.assert_close(weights, recorded["out_importance"], rtol=1e-4, atol=1e-5)


SEEDS = st.integers(0, 10**6)


@FEW
@given(SEEDS, st.sampled_from([0.1, 0.4, 1.0]), st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_official_rule_is_the_formulas(seed: int, tau: float, least: float, more: float) -> None:
    logits, visual = drawn(seed)
    active = by_mass(logits, visual, Budget(tau, least, least + more))
    for row, own in enumerate(logits.double()):
        weights = (own / tau).softmax(1)
        mass = float(weights[:, visual[row]].sum(1).max())
        share = np.float32(min(max(mass, least), least + more))
        total = int(visual[row].sum())
        count = min(max(int(share * np.float32(total)), 1), total)
        assert abs(int(active[row].sum()) - count) <= (abs(mass * total - round(mass * total)) < 1e-3)
        mean = logits[row].mean(0)
        chosen = mean[active[row]]
        assert not (active[row] & ~visual[row]).any()
        assert float(chosen.min()) >= float(mean[visual[row] & ~active[row]].max())


@FEW
@given(SEEDS, st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_nothing(seed: int, constant: float) -> None:
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randint(-40, 40, (2, 4, 60), generator=dice) / 8  # so that sums are exact
    shifted, visual = logits + round(constant * 8) / 8, drawn(seed)[1]
    budget, valid = Budget(0.5, 0.1, 0.6), torch.ones_like(visual)
    for rule in (
        lambda own: by_mass(own, visual, budget),
        lambda own: by_block(own, visual, valid, budget, 8),
    ):
        assert torch.equal(rule(logits), rule(shifted))


@FEW
@given(SEEDS, st.floats(0.02, 1.0))
def test_bounds_hold_for_every_variant(seed: int, most: float) -> None:
    logits, visual = drawn(seed)
    total = int(visual[0].sum())
    bound = max(1, int(np.float32(most) * np.float32(total)))
    for active in (
        by_mass(logits, visual, Budget(0.3, 0.0, most)),
        by_importance(logits, visual, Budget(0.3, 0.0, most)),
        by_importance(logits, visual, Budget(0.3, 0.0, most), 0.95),
    ):
        counts = (active & visual).sum(1)
        assert int(counts.min()) >= 1
        assert int(counts.max()) <= bound


@FEW
@given(SEEDS, st.integers(0, 30))
def test_padding_and_other_samples_change_nothing(seed: int, pads: int) -> None:
    """Blocks, too, are counted without padding."""
    logits, visual = drawn(seed, 1)
    valid = torch.ones_like(visual)
    padded = torch.nn.functional.pad(logits, (pads, 0), value=-torch.inf)
    more = (torch.nn.functional.pad(own, (pads, 0)) for own in (visual, valid))
    seen, real = (torch.cat((own, own.flip(1))) for own in more)
    padded = torch.cat((padded, padded.flip(2)))
    budget = Budget(0.4, 0.1, 0.5)
    assert torch.equal(by_mass(padded, seen, budget)[:1, pads:], by_mass(logits, visual, budget))
    assert torch.equal(by_block(padded, seen, real, budget, 7)[:1, pads:], by_block(logits, visual, valid, budget, 7))
    assert torch.equal(by_importance(padded, seen, budget)[:1, pads:], by_importance(logits, visual, budget))


def test_ties_go_to_the_first_and_a_sample_without_vision_parks_nothing() -> None:
    visual = torch.tensor([[False, True, True, True, True, False], [False] * 6])
    active = by_mass(torch.zeros(2, 3, 6), visual, Budget(0.1, 0.5, 0.5))
    assert active.tolist() == [[False, True, True, False, False, False], [False] * 6]


def test_entries_that_the_anchor_cannot_see_are_counted_and_come_last() -> None:
    """As where a sliding window ends: the smallest share is read all the same, not text in place of it."""
    visual = torch.arange(40) >= 4
    visual[-4:] = False
    for hidden in (-torch.inf, torch.finfo(torch.float32).min):
        logits = torch.zeros(1, 4, 40)
        logits[:, :, :36] = hidden
        assert by_mass(logits, visual[None], Budget(0.1, 0.25, 0.5)).nonzero()[:, 1].tolist() == list(range(4, 12))
        logits[:, :, 30] = 1.0
        active = by_mass(logits, visual[None], Budget(0.1, 0.25, 0.25))
        assert active.nonzero()[:, 1].tolist() == [*range(4, 11), 30]


def test_an_anchor_after_which_nothing_could_be_read_less_is_refused() -> None:
    shapes = (BackboneShape(6, 16), 5), (BackboneShape(6, 16, attending=(1, 4)), 4)
    for shape, last in shapes:
        for variant in ("blocks", "port"):
            with pytest.raises(PolicyError, match=rf"stages\.read\.at: no layer after {last} has attention"):
                resolve(dropflow.load_policy(policy(read=HALF | {"at": last, "variant": variant})), shape)
        resolve(dropflow.load_policy(policy(read=HALF | {"at": last})), shape)


def test_a_fixed_share_of_the_other_port_is_rounded_half_to_even_and_bounded() -> None:
    logits, visual = drawn(0, 1, 22)
    assert int(visual.sum()) == 10
    counts = [
        int(by_importance(logits, visual, Budget(0.4, 0.0, 1.0, share)).sum()) for share in (0.25, 0.35, 0.01, 0.99)
    ]
    assert counts == [2, 4, 1, 10]
    assert int(by_importance(logits, visual, Budget(0.4, 0.0, 0.37, 0.99)).sum()) == 3
    assert int(by_importance(logits, visual, Budget(0.4, 0.31, 1.0, 0.1)).sum()) == 4


def decode(model: Any, inputs: dict[str, Tensor], steps: int = 3) -> tuple[list[Tensor], Any]:
    cache, mask = DynamicCache(), inputs["attention_mask"]
    found = [model(**inputs, **{CACHE_ARGUMENT: cache}).logits[:, -1]]
    for step in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        token = torch.full((len(mask), 1), 7 + step)
        found.append(model(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits[:, -1])
    return found, cache


@torch.no_grad()
def test_a_fixed_share_of_all_is_dense_bit_for_bit(llava: Any) -> None:
    plain, _ = decode(llava, prompt())
    with dropflow.attach(llava, policy(read={"use": STAGE, "at": 2, "fixed": 1.0})):
        found, _ = decode(llava, prompt())
    assert all(map(torch.equal, found, plain))


@torch.no_grad()
def test_the_first_token_and_the_layers_up_to_the_anchor_are_dense(llava: Any) -> None:
    """The other port restricts the prompt's last token; here no variant does."""
    plain, full = decode(llava, prompt())
    for variant in ("official", "blocks", "port"):
        with dropflow.attach(llava, policy(read=HALF | {"variant": variant, "block": 4})):
            found, cache = decode(llava, prompt())
        assert torch.equal(found[0], plain[0])
        assert not torch.equal(found[1], plain[1])
        same = [torch.equal(own.keys, other.keys) for own, other in zip(cache.layers, full.layers, strict=True)]
        assert same == [number <= (2 if variant == "official" else 3) for number in range(6)]


@torch.no_grad()
def test_conversations_that_take_turns_keep_their_own_vision(llava: Any) -> None:
    """In the released code, the second prompt replaces the mask that says where the first one's vision is."""
    prompts = [prompt(((3, "I", 5),)), prompt(((6, "I", 2, "I", 1),), seed=4)]
    with dropflow.attach(llava, policy(read=HALF)):
        expected = [decode(llava, own)[0] for own in prompts]
        caches = [DynamicCache(), DynamicCache()]
        for own, cache in zip(prompts, caches, strict=True):
            llava(**own, **{CACHE_ARGUMENT: cache})
        for step in range(3):
            for cache, logits in zip(caches, expected, strict=True):
                found = llava(input_ids=torch.tensor([[7 + step]]), **{CACHE_ARGUMENT: cache}).logits[:, -1]
                assert relative_error(found, logits[step + 1]) < 1e-5


@torch.no_grad()
def test_a_step_of_several_tokens_is_dense(llava: Any) -> None:
    inputs, drafts = prompt(((3, "I", 5),)), torch.tensor([[7, 8]])
    caches = [DynamicCache(), DynamicCache()]
    llava(**inputs, **{CACHE_ARGUMENT: caches[0]})
    plain = llava(input_ids=drafts, **{CACHE_ARGUMENT: caches[0]}).logits
    with dropflow.attach(llava, policy(read=HALF)):
        llava(**inputs, **{CACHE_ARGUMENT: caches[1]})
        assert torch.equal(llava(input_ids=drafts, **{CACHE_ARGUMENT: caches[1]}).logits, plain)


@torch.no_grad()
def test_every_attention_implementation_reads_the_same() -> None:
    """The released code needs eager attention."""
    found = []
    for attention_of in ("sdpa", "eager"):
        model = tiny_llava(attention=attention_of)
        with dropflow.attach(model, policy(read=HALF)) as flow:
            found.append((decode(model, prompt())[0], flow.report().kv_entries_read_over_time))
    assert found[0][1] == found[1][1]
    assert all(relative_error(one, other) < 1e-5 for one, other in zip(found[0][0], found[1][0], strict=True))


@torch.no_grad()
def test_all_images_of_a_sample_share_a_budget_and_samples_do_not(llava: Any) -> None:
    inputs = prompt(((3, "I", 5), ("I", 2, "I", 9)))
    visual = (inputs["input_ids"] == IMAGE).sum(1)
    assert visual.tolist() == [16, 32]
    with dropflow.attach(llava, policy(read=HALF | {"fixed": 0.25})) as flow:
        decode(llava, inputs, 1)
        report = flow.report()
    own = inputs["attention_mask"].sum(1) + 1 - visual
    assert report.layers[3].kv_entries_read == float((own + torch.tensor([4, 8])).double().mean())
    assert report.layers[1].kv_entries_read == float((own + visual).double().mean())
    assert report.kv_entries_over_time[-1] == 6 * float((own + visual).double().mean())


@torch.no_grad()
def test_shares_are_of_what_the_anchor_still_holds(llava: Any) -> None:
    pruned = {"prune": {"use": "control/stride", "keep": {1: 8}}, "read": HALF | {"fixed": 0.5}}
    inputs = prompt(((3, "I", 5),))
    with dropflow.attach(llava, policy(**pruned)) as flow:
        decode(llava, inputs, 1)
        rows = flow.report().layers
    text = int(inputs["attention_mask"].sum()) + 1 - 16
    assert [row.kv_entries_read - text for row in rows] == [16, 8, 4, 4, 4, 4]


@torch.no_grad()
def test_beams_and_returned_sequences(llava: Any) -> None:
    inputs = prompt(((3, "I", 5), (2, "I", 9)))
    with dropflow.attach(llava, policy(read=HALF)):
        once = llava.generate(**inputs, **TOKENS)
        assert torch.equal(llava.generate(**inputs, **TOKENS), once)
        several = llava.generate(**inputs, **(TOKENS | {"num_beams": 3, "num_return_sequences": 3}))
        assert torch.equal(several[::3], llava.generate(**inputs, **(TOKENS | {"num_beams": 3})))


def test_the_anchor_is_a_layer_with_attention() -> None:
    mixed = BackboneShape(6, 16, attending=(1, 4))
    at = resolve(dropflow.load_policy(policy(read=HALF | {"at": 3})), mixed).stages[0][1]
    assert at.decode_reads_at == (1,)
    for wrong in (0, 6):
        with pytest.raises(PolicyError, match=rf"stages\.read\.at: layer {wrong} has no attention"):
            resolve(dropflow.load_policy(policy(read=HALF | {"at": wrong})), mixed)
    for options, told in (
        ({"budget_min": 0.6}, "is above `budget_max`"),
        ({"top_p": 0.9}, "goes with `variant: port`"),
        ({"variant": "port", "fixed": 0.9}, r"`fixed` 0\.9 lies outside `budget_min` 0\.3 to `budget_max` 0\.5"),
    ):
        with pytest.raises(PolicyError, match=told):
            dropflow.load_policy(policy(read=HALF | options))


@pytest.mark.parametrize(
    ("name", "first", "variant"),
    [
        ("visionpulse-5", 17, "official"),
        ("visionpulse-10", 17, "official"),
        ("visionpulse-blocks-10", 17, "blocks"),
        ("visionpulse-internvl3.5-5", 17, "official"),
    ],
)
def test_published_settings(name: str, first: int, variant: str) -> None:
    plan = resolve(dropflow.load_policy(name), BackboneShape(36, None))
    ((_, own),) = plan.stages
    assert own.decode_reads_at == (first,)
    assert own.options.variant == variant
    assert (own.options.budget_max == 0.05) == name.endswith("-5")
    assert plan.schedule(1024).per_layer == (1024,) * 36


SEVERAL = ("llava", "qwen3_vl", "internvl", "gemma3", "qwen3_5")


@pytest.mark.parametrize(
    ("variant", "families"),
    [
        ("official", ("qwen3_vl", "qwen3_5")),
        *(pytest.param(variant, SEVERAL, marks=pytest.mark.slow) for variant in ("official", "blocks", "port")),
    ],
)
def test_it_conforms_on_several_families(variant: str, families: tuple[str, ...]) -> None:
    chosen = {name: tiny_models()[name] for name in families}
    cells = assert_stage_conforms(STAGE, {**DecodeRead.example, "variant": variant, "block": 3}, chosen)
    assert {cell.adapter: cell.outcome for cell in cells} == dict.fromkeys(chosen, "run")

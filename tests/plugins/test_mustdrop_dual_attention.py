"""The dual-attention filter on a model: who votes, budgets, several pictures, labels, drafts, and no map anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dropflow
from dropflow.errors import PolicyError
from dropflow.operators import text_rows
from dropflow_mustdrop import DualAttention
from dropflow_mustdrop.filtering import block_totals, dual_keep

FILTER = {"use": "mustdrop/dual-attention", "at": [2, 4], "global_threshold": 0.06, "individual_threshold": 0.08}
BUDGET = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def expected_scores(maps: Tensor, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """G and M of every token of one sample by the eager model's map (heads, n, n)."""
    visual = ids == IMAGE
    rows = (visual.cumsum(0) > 0) & ~visual & real
    weights = maps.mean(0)[rows]
    return weights.sum(0), weights.amax(0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_padded_batch_of_several_pictures_is_filtered_by_its_own_text(attention: str, side: str) -> None:
    inputs = prompt(side=side)
    model = tiny_llava(attention=attention)
    with dropflow.attach(model, policy(filter=FILTER | {"at": [2]})) as flow:
        model(**inputs)
        live = flow.live()
    maps = tiny_llava(attention="eager")(**inputs, output_attentions=True).attentions[1]
    dropped = 0
    for sample, (ids, real) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
        if not (ids == IMAGE).any():
            assert torch.equal(live[2, sample], real)
            continue
        sums, peaks = expected_scores(maps[sample], ids, real)
        totals = block_totals(sums[None], (ids == IMAGE)[None])[0]
        keep = dual_keep(sums, peaks, totals, 0.06, 0.08) | (ids != IMAGE)
        assert torch.equal(live[2, sample], keep & real)
        assert torch.equal(live[1, sample], real)
        dropped += int((real & ~keep).sum())
    assert dropped > 5


@torch.no_grad()
def test_a_budget_keeps_the_best_ranked_of_every_picture(llava: Any) -> None:
    inputs = prompt()
    with dropflow.attach(llava, policy(filter={"use": "mustdrop/dual-attention", "keep": {2: 9, 4: 0.25}})) as flow:
        llava(**inputs)
        visual = (flow.live() & (inputs["input_ids"] == IMAGE)).sum(2)
        assert flow.plan.schedule().per_layer == (16, 16, 9, 9, 4, 4)
    assert visual.tolist() == [[16, 32, 0]] * 2 + [[9, 18, 0]] * 2 + [[4, 8, 0]] * 2
    keys = {"use": "mustdrop/key-set", "share": 0.3}
    with dropflow.attach(llava, policy(keys=keys, filter={"use": "mustdrop/dual-attention", "keep": {2: 7}})) as flow:
        llava(**inputs)
        visual = (flow.live() & (inputs["input_ids"] == IMAGE)).sum(2)
        protected = flow._last().prompt.protected
        assert protected.sum(1).tolist() == [5, 10, 0]
        assert bool((flow.live()[-1] | ~protected).all())
    assert visual[2].tolist() == [7, 14, 0]  # protected tokens count


@torch.no_grad()
def test_a_budget_is_where_a_common_factor_on_both_thresholds_leads(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    for factor in (0.5, 1.0, 2.0):
        thresholds = {"global_threshold": 0.06 * factor, "individual_threshold": 0.05 * factor}
        with dropflow.attach(llava, policy(filter=FILTER | thresholds | {"at": [3]})) as flow:
            llava(**inputs)
            live = flow.live()
        count = int((live[3] & (inputs["input_ids"] == IMAGE)).sum())
        budget = {"use": "mustdrop/dual-attention", "keep": {3: count}, "global_threshold": 0.06}
        with dropflow.attach(llava, policy(filter=budget | {"individual_threshold": 0.05})) as flow:
            llava(**inputs)
            assert torch.equal(flow.live(), live)


@torch.no_grad()
def test_without_text_behind_the_picture_nothing_is_dropped(llava: Any) -> None:
    inputs = prompt([(3, "I"), (2, "I", 6)])
    for which in (FILTER, {"use": "mustdrop/dual-attention", "keep": {2: 3}}):
        with dropflow.attach(llava, policy(filter=which)) as flow:
            logits = llava(**inputs).logits
            visual = (flow.live()[-1] & (inputs["input_ids"] == IMAGE)).sum(1)
        assert visual[0] == 16
        assert visual[1] < 16
        with dropflow.attach(llava, policy(filter=which)):
            own = inputs["attention_mask"][0].bool()
            alone = llava(input_ids=inputs["input_ids"][:1, own], pixel_values=inputs["pixel_values"][:1]).logits[0]
        assert relative_error(logits[0, own], alone) < 1e-5


@torch.no_grad()
def test_drafts_and_answers_do_not_vote(llava: Any) -> None:
    inputs = prompt([(6, "I", 9)])
    inputs["input_ids"][0, 1:4] = inputs["input_ids"][0, -3:]  # something to look up
    with dropflow.attach(llava, policy(filter=FILTER)) as flow:
        greedy = llava.generate(**inputs, **BUDGET)
        live = flow.live()
        looked_up = llava.generate(**inputs, **BUDGET, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
        assert torch.equal(flow.live()[:, :, : live.shape[2]], live)
        answered = {**inputs, "input_ids": greedy, "attention_mask": torch.ones_like(greedy)}
        labels = greedy.masked_fill(torch.arange(greedy.shape[1]) < live.shape[2], -100)
        llava(**answered, labels=labels)
        assert torch.equal(flow.live()[:, :, : live.shape[2]], live)
        llava(**answered, labels=torch.full_like(labels, -100))
        assert flow.live().all()  # nobody asks
    assert not live.all()
    assert torch.equal(looked_up, greedy)


@torch.no_grad()
def test_rows_are_the_text_behind_the_first_picture(llava: Any) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Look(dropflow.Stage[Any]):
        prune_at = (1,)

        @dropflow.hookimpl
        def prune(self, call: dropflow.PruneCall) -> None:
            seen.append(text_rows(call))

    inputs = prompt([(1, "I", 2), (2, "I", 1, "I", 1)])
    with dropflow.attach(llava, policy(look={"use": Look})):
        llava(**inputs)
    rows, asks = seen[0]
    width = inputs["input_ids"].shape[1]
    assert asks.all()
    assert rows.tolist() == [[width - 2, width - 1], [19, 36]]


@torch.no_grad()
def test_no_square_map_is_allocated() -> None:
    model, inputs = tiny_llava(grid=12, kv_heads=4, layers=4), prompt([(3, "I", 60)], grid=12)
    tokens = inputs["input_ids"].shape[1]
    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if isinstance(output, Tensor):
                largest[0] = max(largest[0], output.numel())
            return output

    stages = {
        "merge": {"use": "mustdrop/spatial-merge", "threshold": 0.2},
        "keys": {"use": "mustdrop/key-set"},
        "filter": FILTER | {"at": [1, 2, 3]},
        "cache": {"use": "mustdrop/output-aware-cache", "at": 1, "interval": 1, "threshold": 0.01},
    }
    # one square map would be larger than anything of width 99 (the vocabulary); the tower's would be 145 squared
    assert tokens**2 > tokens * 99
    with dropflow.attach(model, policy(**stages)), Largest():
        model.generate(**inputs, max_new_tokens=3)
    assert largest[0] < min(tokens**2, 2 * 145**2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"stages\.f: expected either `at` .* or `keep`"),
        ({"at": [2], "keep": {2: 3}}, r"stages\.f: expected either `at` .* or `keep`"),
        ({"at": [0]}, r"stages\.f\.at: boundary 0 is ranked by the attention of layer -1.* from 1 to 5"),
        ({"at": [6]}, r"stages\.f\.at: boundary 6 is ranked by .* from 1 to 5"),
        ({"at": [2, 2]}, r"stages\.f\.at: boundary 2 is named twice"),
        ({"at": [2], "global_threshold": -1.0}, r"stages\.f\.global_threshold: input should be greater"),
        ({"keep": {2: 3}, "individual_threshold": 0.0}, r"stages\.f: with `keep` both thresholds weigh"),
        ({"keep": {2: 30}}, r"stages\.f\.keep\.2: keeps 30 visual tokens, more than the 16"),
    ],
)
def test_faults_are_named(llava: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dropflow.attach(llava, policy(f={"use": "mustdrop/dual-attention"} | options))


def test_a_filter_needs_a_layer_with_vision_in_front(llava: Any) -> None:
    which = policy(inject={"use": "hidrop/late-injection", "at": 2}, f=FILTER | {"at": [2]})
    with pytest.raises(PolicyError, match=r"layer 1, but vision takes part in layers 2 to 5; .* from 3 to 5"):
        dropflow.attach(llava, which)
    with dropflow.attach(llava, policy(inject=which["stages"]["inject"], f=FILTER | {"at": [3]})) as flow:
        assert isinstance(flow.plan.stages[1][1], DualAttention)
        with torch.no_grad():
            llava(**prompt())
        assert not flow.live()[3:].all()

"""The conformance kit detects each broken guarantee, and says which one, where and by how much."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dropflow import CacheCall, CacheKeep, Keep, PruneCall, Stage, hookimpl
from dropflow.engine.attach import model_hooks, refusals
from dropflow.engine.decoder.prompt_run import PromptRun
from dropflow.engine.model.shadowing import Shadows
from dropflow.operators import keep_top
from dropflow.testing import (
    BrokenGuarantee,
    assert_stage_conforms,
    check_batch_invariance,
    check_drop_is_mask,
    check_isolation,
    check_no_op,
    check_refusals,
    tiny_models,
)
from dropflow.testing.case import Case
from dropflow.testing.overlapped import check_same_bits
from dropflow.testing.probes import RAGGED, WINDOW, KeepAll, policy, use

FAMILIES = tiny_models()


def case(which: dict[str, Any], name: str = "llava") -> Case:
    return Case(name, *FAMILIES[name], which)


def test_what_the_model_adds_behind_layers_being_lost_breaks_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_no_op(case(WINDOW, "qwen3_vl")) == 0.0
    monkeypatch.setattr(PromptRun, "_with_residual", lambda _, __, hidden: hidden)
    with pytest.raises(BrokenGuarantee, match=r"qwen3_vl: guarantee 1 \(no-op identity\) is broken: logits differ"):
        check_no_op(case(WINDOW, "qwen3_vl"))


def test_positions_of_other_tokens_break_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    from dropflow.engine.decoder import layer_arguments

    def first_positions(name: str, value: Any, live: Any, more: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(first_positions(name, item, live, more) for item in value)
        return value[..., : live.slots, :].expand(live.index.shape[0], -1, -1) if value.dim() == 3 else value

    assert 0 < check_drop_is_mask(case(WINDOW)) < 1e-5
    monkeypatch.setattr(layer_arguments, "restrict", first_positions)
    message = r"guarantee 2 \(drop = mask\) is broken: before layer 1, sample 0.*by \d.*allowed 1e-05"
    with pytest.raises(BrokenGuarantee, match=message):
        check_drop_is_mask(case(WINDOW))


class Neighbourly(Stage[Any]):
    """Keeps as many tokens as there are samples."""

    prune_at = (2,)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """Depends on the neighbours."""
        visual = call.image_id >= 0
        return Keep(~visual | (visual.cumsum(1) <= len(visual)))


def test_a_stage_that_looks_at_neighbours_breaks_the_third() -> None:
    assert 0 < check_batch_invariance(case(RAGGED)) < 1e-5
    message = r"Neighbourly x llava: guarantee 3 \(batch invariance\) .* sample 0 keeps other tokens .* from layer 2 on"
    with pytest.raises(BrokenGuarantee, match=message):
        assert_stage_conforms(Neighbourly, models={"llava": FAMILIES["llava"]})


class SeesBeams(Stage[Any]):
    """Keeps everything unless the samples are beams of fewer."""

    prune_at = (2,)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """The same alone and in a batch of others."""
        index = call.hidden.flatten(1)
        beams = len(index) > 1 and bool((index[0] == index[1]).all())
        return Keep(torch.full_like(call.valid, not beams))


def test_a_stage_that_treats_beams_otherwise_breaks_the_third() -> None:
    message = r"SeesBeams x llava: guarantee 3 .*: beam 0 of sample 0 keeps other tokens than the sample alone"
    with pytest.raises(BrokenGuarantee, match=message):
        assert_stage_conforms(SeesBeams, models={"llava": FAMILIES["llava"]})


class RanksByNothing(Stage[Any]):
    """Divides by an attention of zero."""

    prune_at = (2,)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        """NaN for every token, so that the first ones would stay."""
        scores = torch.zeros_like(call.hidden[..., 0]) / 0
        return Keep(keep_top(scores, call.image_id, [4] * len(call.image_sizes)), scores)


def test_a_stage_that_ranks_by_nan_is_named() -> None:
    message = r"RanksByNothing x llava: guarantee 2 .*: stages\.stage ranks visual tokens by NaN at boundary 2"
    with pytest.raises(BrokenGuarantee, match=message):
        assert_stage_conforms(RanksByNothing, models={"llava": FAMILIES["llava"]})


class EvictAfterPrefill(Stage[Any]):
    """Layers 2 and 3 keep the first three visual entries of each sample."""

    @hookimpl
    def decode_cache(self, call: CacheCall) -> CacheKeep:
        """The same in both layers."""
        return CacheKeep({layer: (call.layers[layer].image_id >= 0).cumsum(1) <= 3 for layer in (2, 3)})


class EvictWhileDecoding(EvictAfterPrefill):
    """Asks again at every step."""

    decode_every = 1


def test_evicted_entries_are_hidden_from_later_tokens_of_the_masked_run() -> None:
    models = {name: FAMILIES[name] for name in ("llava", "gemma3", "qwen3_vl")}
    cells = assert_stage_conforms(EvictAfterPrefill, models=models)
    assert [(cell.outcome, cell.detail) for cell in cells] == [("run", "")] * 3
    (cell,) = assert_stage_conforms(EvictWhileDecoding, models={"llava": models["llava"]})
    assert cell.outcome == "run"
    assert cell.detail.startswith("generated tokens not compared")


def test_eviction_that_the_masked_run_does_not_know_of_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from dropflow.testing import guarantees

    monkeypatch.setattr(guarantees, "_held", lambda *_: None)
    with pytest.raises(BrokenGuarantee, match=r"guarantee 2 .*: from decode step 1 on, the generated tokens differ"):
        assert_stage_conforms(EvictAfterPrefill, models={"llava": FAMILIES["llava"]})


def test_layers_left_replaced_break_the_fourth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_isolation(case(WINDOW)) == 0.0

    class Forgetful(Shadows):
        def lift_all(self) -> None:
            pass

    monkeypatch.setattr(model_hooks, "Shadows", Forgetful)
    with pytest.raises(
        BrokenGuarantee, match=r"guarantee 4 \(isolation\) is broken: detaching leaves .*language_model"
    ):
        check_isolation(case(WINDOW))


@pytest.mark.parametrize("which", [WINDOW, policy(keep=use(KeepAll))], ids=["window", "keeps all"])
def test_a_refusal_left_out_breaks_the_fifth(monkeypatch: pytest.MonkeyPatch, which: dict[str, Any]) -> None:
    assert check_refusals(case(which)) == 0.0
    monkeypatch.setattr(refusals, "check_placeholders", lambda *_: None)
    with pytest.raises(
        BrokenGuarantee, match=r"guarantee 5 .*: placeholders without an image is not refused with Miss"
    ):
        check_refusals(case(which))


def test_unfinished_values_are_no_small_error() -> None:
    from dropflow.testing.case import relative_error

    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_a_form_of_features_that_the_core_does_more_with_breaks_the_first() -> None:
    family, tiny = FAMILIES["molmo2"]  # adds features to the embeddings of their placeholders

    class Wrong(family):  # type: ignore[misc, valid-type]  # a class that is found at run time
        features_form = "list"

    with pytest.raises(BrokenGuarantee, match=r"guarantee 1 .*with `overlap`, logits differ .* see `features_form`"):
        check_same_bits(Case("molmo2", Wrong, tiny, WINDOW))


def test_deepstack_features_that_nobody_counts_break_the_first() -> None:
    family, tiny = FAMILIES["qwen3_vl"]

    class Wrong(family):  # type: ignore[misc, valid-type]  # a class that is found at run time
        deepstack_levels = 1

    check_same_bits(Case("qwen3_vl", family, tiny, WINDOW))
    with pytest.raises(BrokenGuarantee, match=r"guarantee 1 .*with `overlap`, logits differ .* `deepstack_levels` of"):
        check_same_bits(Case("qwen3_vl", Wrong, tiny, WINDOW))

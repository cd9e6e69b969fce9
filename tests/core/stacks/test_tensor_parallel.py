"""A tensor-parallel model of two ranks keeps the tokens that one device keeps, on both ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from seven import SEVEN, Outcome, outcome
from tiny import HIDROP, policy, prompt, relative_error, tiny_llava
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, LlavaForConditionalGeneration

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import DropflowError

RANKS = 2
VOCABULARY = 100
"""What two ranks can share."""
INPUTS = prompt()
"""Padded, of ragged lengths."""
NEW_TOKENS = 5
MORE = {
    "keep-all": policy(keep={"use": "control/keep-all"}),
    "best heads": policy(rate={"use": "sparsevlm/gravity-corrected", "keep": {2: 0.4, 4: 0.2}, "heads": 0.5}),
    "eviction while decoding": policy(
        cache={"use": "mustdrop/output-aware-cache", "at": 1, "interval": 1, "budget": 0.3}
    ),
    "compact": HIDROP | {"positions": "compact"},
}
"""Stages that choose among heads, read attention while decoding, or move positions."""
POLICIES: dict[str, Any] = {**SEVEN, **MORE}
SOFT = HIDROP["stages"]["pyramid"] | {"select": "soft"}


def second_turn(model: Any) -> torch.Tensor:
    """Logits of a later prompt with an image, which ranks by the keys of the first one, too."""
    first, later = prompt([(3, "I", 5)]), prompt([(4, "I", 3)], seed=2)
    cache = DynamicCache()
    with dropflow.attach(model, HIDROP), torch.no_grad():
        model(**first, **{CACHE_ARGUMENT: cache})
        mask = torch.ones(1, first["input_ids"].shape[1] + later["input_ids"].shape[1], dtype=torch.long)
        logits: torch.Tensor = model(**(later | {"attention_mask": mask}), **{CACHE_ARGUMENT: cache}).logits
    return logits


def refusal(model: Any, which: Any) -> str:
    try:
        dropflow.attach(model, which).detach()
    except DropflowError as error:
        return str(error)
    return ""


def work(folder: Path) -> None:
    """What each rank does, and writes down."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for attention in ("sdpa", "eager"):
        load = LlavaForConditionalGeneration.from_pretrained
        model = load(folder / "model", tp_plan="auto", attn_implementation=attention).eval()
        query = model.get_decoder().layers[0].self_attn.q_proj.weight
        assert isinstance(query, DTensor)
        assert query.to_local().shape[0] == query.shape[0] // RANKS
        if attention == "eager":
            found["eager"] = outcome(model, HIDROP, INPUTS, new_tokens=NEW_TOKENS)
            continue
        found |= {name: outcome(model, which, INPUTS, new_tokens=NEW_TOKENS) for name, which in POLICIES.items()}
        found["plain"] = outcome(model, None, INPUTS, new_tokens=NEW_TOKENS)
        found["second turn"] = second_turn(model)
        found["soft"] = refusal(model, HIDROP | {"stages": HIDROP["stages"] | {"pyramid": SOFT}})
        model.tp_plan = model.tp_plan | {"model.language_model.norm": "sequence_parallel"}
        found["sequence"] = refusal(model, HIDROP)
    torch.save(found, folder / f"{distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found, which run all policies one after the other."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    tiny_llava(vocabulary=VOCABULARY).save_pretrained(folder / "model")
    debug_launcher(work, (folder,), num_processes=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def one_device() -> Any:
    return tiny_llava(vocabulary=VOCABULARY)


@pytest.mark.parametrize("which", [*POLICIES, "plain"])
def test_both_ranks_keep_and_answer_what_one_device_does(
    ranks: list[dict[str, Any]], one_device: Any, which: str
) -> None:
    expected = outcome(one_device, POLICIES.get(which), INPUTS, new_tokens=NEW_TOKENS)
    for found in (rank[which] for rank in ranks):
        assert isinstance(found, Outcome)
        assert torch.equal(found.live, expected.live)
        assert torch.equal(found.tokens, expected.tokens)
        assert relative_error(found.logits, expected.logits) < 1e-5
    assert not torch.equal(ranks[0][which].logits, expected.logits), "the ranks have not shared the work"
    assert torch.equal(expected.tokens, ranks[0]["plain"].tokens) == (which in ("plain", "keep-all"))


def test_eager_attention_is_shared_alike(ranks: list[dict[str, Any]]) -> None:
    expected = outcome(tiny_llava(vocabulary=VOCABULARY, attention="eager"), HIDROP, INPUTS, new_tokens=NEW_TOKENS)
    for found in (rank["eager"] for rank in ranks):
        assert torch.equal(found.live, expected.live)
        assert torch.equal(found.tokens, expected.tokens)
        assert relative_error(found.logits, expected.logits) < 1e-5


def test_a_second_turn_ranks_by_the_keys_that_every_rank_holds(ranks: list[dict[str, Any]], one_device: Any) -> None:
    expected = second_turn(one_device)
    for rank in ranks:
        assert relative_error(rank["second turn"], expected) < 1e-5


def test_what_ranks_cannot_share_is_refused_on_each_of_them(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["soft"].startswith("stages.pyramid: trains its selection, for which gradients would have to cross")
        assert rank["sequence"].startswith("tp_plan: sequence_parallel: dropflow does not know what a rank sees")

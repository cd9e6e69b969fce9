"""How often the host waits for the device: once per boundary that changes the live set, and a few times to set up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from syncs import HostSyncs
from tiny import HIDROP, KEEP_ALL, policy, prompt, tiny_llava

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT

EIGHT = (("I", 2, "I", "I", 3), ("I", 2), ("I", "I", 4, "I", "I", 9))


def test_every_kind_of_wait_is_counted() -> None:
    values = torch.tensor([3, 1, 2])
    with HostSyncs() as syncs:
        values.tolist()
        int(values[0])
        bool(values.any())
        values[0].item()
        values.nonzero()
        values[values > 1]
        torch.bincount(values)
        torch.equal(values, values)
        torch.tensor([1, 2])
        values.repeat_interleave(torch.full((3,), 2))
        values.masked_select(values > 1)
    assert len(syncs.places) == 11
    with HostSyncs() as none:
        values.sort()
        values.gather(0, values - 1)
        torch.where(values > 1, values, 0).cumsum(0)
        torch.zeros(4).index_add_(0, values, values.float())
        torch.arange(3)
    assert none.places == []


@torch.no_grad()
def waits(model: Any, inputs: dict[str, Any]) -> tuple[HostSyncs, HostSyncs]:
    """Waits of a prefill and of the following decode step."""
    with HostSyncs() as prefill:
        cache = model(**inputs, use_cache=True)[CACHE_ARGUMENT]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with HostSyncs() as decode:
        model(input_ids=torch.full((len(mask), 1), 5), attention_mask=mask, **{CACHE_ARGUMENT: cache})
    return prefill, decode


def counted(model: Any, which: Any, inputs: dict[str, Any]) -> tuple[int, int]:
    """Number of waits that a policy adds to those of the plain model, in a prefill and in the next decode step."""
    plain = waits(model, inputs)
    with dropflow.attach(model, which):
        flowing = waits(model, inputs)
    for found in flowing:
        print("", *found.places, sep="\n")
    prefill, decode = (len(mine.places) - len(own.places) for mine, own in zip(flowing, plain, strict=True))
    return prefill, decode


SET_UP = 4
"""Waits before the first layer runs."""


@pytest.mark.parametrize(
    ("which", "boundaries"),
    [
        (KEEP_ALL, 1),
        (HIDROP, 2),  # entry and exit move what the prompt knows already
        (policy(pyramid={"use": "pyramiddrop/pyramid", "keep": {1: 9, 3: 5, 5: 2}}), 3),
        (policy(rank={"use": "fastv/attention-rank", "at": 2, "keep": 5}), 1),
        (policy(words={"use": "mustdrop/dual-attention", "keep": {2: 8, 4: 3}}), 2),
        (policy(words={"use": "mustdrop/dual-attention", "at": [2, 4]}), 2),
        (policy(leave={"use": "vtw/withdrawal", "at": 3}), 0),
        (policy(all={"use": "control/keep-all"}), 6),  # asked at every boundary
    ],
    ids=["keep-all", "hidrop", "pyramiddrop", "fastv", "dual-attention", "thresholds", "vtw", "keep-all-of-six"],
)
@pytest.mark.parametrize("samples", [((3, "I", 5),), EIGHT], ids=["one", "ragged"])
def test_the_host_waits_once_per_boundary_and_never_while_decoding(
    llava: Any, which: Any, boundaries: int, samples: Any
) -> None:
    prefill, decode = counted(llava, which, prompt(samples))
    assert prefill <= SET_UP + boundaries
    assert decode == 0


@pytest.mark.parametrize(
    ("which", "most"),
    [
        (policy(prune={"use": "divprune/max-min", "keep": 6}), 12),
        (policy(merge={"use": "tome/token-merging", "r": 1, "layers": 3}), SET_UP + 1),  # no more for more layers
        (policy(keep={"use": "visionzip/dominant-contextual", "dominant": 5, "contextual": 2}), SET_UP + 1),
        (policy(cover={"use": "scope/saliency-coverage", "keep": 6}), SET_UP + 1),
        (policy(keep={"use": "mustdrop/key-set"}), SET_UP),
        (policy(merge={"use": "mustdrop/spatial-merge"}), SET_UP + 1),
        (policy(merge={"use": "prumerge/prune-merge"}), 12),
    ],
    ids=["divprune", "tome", "visionzip", "scope", "key-set", "spatial-merge", "prumerge"],
)
def test_encode_stages_of_eight_images_wait_a_few_times(llava: Any, which: Any, most: int) -> None:
    inputs = prompt(EIGHT)
    assert len(inputs["pixel_values"]) == 8
    prefill, decode = counted(llava, which, inputs)
    assert prefill <= most
    assert decode == 0


def test_merging_in_every_layer_waits_no_more_than_in_one() -> None:
    model, inputs = tiny_llava(), prompt(EIGHT)
    one, _ = counted(model, policy(merge={"use": "tome/token-merging", "r": 3, "layers": 1}), inputs)
    all_of_them, _ = counted(model, policy(merge={"use": "tome/token-merging", "r": 3, "layers": 3}), inputs)
    assert all_of_them == one


@torch.no_grad()
def test_a_step_that_evicts_waits_once_and_other_steps_never(llava: Any) -> None:
    inputs = prompt(((3, "I", 5), ("I", 2)))

    def steps() -> list[int]:
        cache, mask, counts = llava(**inputs, use_cache=True)[CACHE_ARGUMENT], inputs["attention_mask"], []
        for _ in range(4):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            with HostSyncs() as step:
                llava(input_ids=torch.full((2, 1), 5), attention_mask=mask, **{CACHE_ARGUMENT: cache})
            counts.append(len(step.places))
        return counts

    plain = steps()
    evicting = policy(cache={"use": "mustdrop/output-aware-cache", "at": 2, "budget": 4, "interval": 2})
    with dropflow.attach(llava, evicting):
        assert [mine - own for mine, own in zip(steps(), plain, strict=True)] == [0, 1, 0, 1]

"""The live set against its definition, token by token."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dropflow.engine.tokens.live_set import LiveSet

settings.register_profile("dropflow", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("dropflow")


@st.composite
def live_masks(draw: st.DrawFn) -> Tensor:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=batch, max_size=batch))
    return torch.tensor(rows)


@given(live_masks())
def test_slots_hold_the_live_tokens_in_order_at_the_right_end(live: Tensor) -> None:
    found = LiveSet.of(live)
    for sample, row in enumerate(live):
        expected = row.nonzero()[:, 0].tolist()
        valid = [True] * found.slots if found.valid is None else found.valid[sample].tolist()
        assert valid == [False] * (found.slots - len(expected)) + [True] * len(expected) or not expected
        assert found.index[sample, found.slots - len(expected) :].tolist() == expected


@given(live_masks())
def test_expand_reads_the_last_live_token_at_or_before_each_position(live: Tensor) -> None:
    found = LiveSet.of(live)
    states = found.take(torch.arange(1.0, live.shape[1] + 1).expand(live.shape)[:, :, None])
    full = found.expand(states)[:, :, 0]
    for sample, row in enumerate(live.tolist()):
        last = 0.0
        for token, is_live in enumerate(row):
            last = token + 1.0 if is_live else last
            assert full[sample, token] == last


@given(live_masks(), st.data())
def test_restrict_keeps_states_and_lets_raw_tokens_enter(live: Tensor, data: st.DataObject) -> None:
    flips = data.draw(st.lists(st.booleans(), min_size=live.numel(), max_size=live.numel()))
    later = torch.tensor(flips).view_as(live)
    tokens = torch.arange(live.shape[1]).expand(live.shape)
    old, new = LiveSet.of(live), LiveSet.of(later)
    states = old.take(tokens * 10.0)[:, :, None]
    raw = (-tokens - 1.0)[:, :, None]
    moved = new.restrict(old, states, raw)[:, :, 0]
    for sample in range(len(live)):
        own = later[sample].nonzero()[:, 0].tolist()
        expected = [t * 10.0 if live[sample, t] else -t - 1.0 for t in own]
        assert moved[sample, new.slots - len(own) :].tolist() == expected
    kept = LiveSet.of(live & later)
    still = kept.restrict(old, states, None)[:, :, 0]
    for sample in range(len(live)):
        own = (live & later)[sample].nonzero()[:, 0].tolist()
        assert still[sample, kept.slots - len(own) :].tolist() == [t * 10.0 for t in own]


def test_the_whole_set_is_in_place() -> None:
    whole = LiveSet.whole(2, 3, torch.device("cpu"))
    assert whole.everything
    assert whole.slot.tolist() == [[0, 1, 2]] * 2
    assert LiveSet.of(torch.tensor([[True, False, True]])).restrict(
        LiveSet.whole(1, 3, torch.device("cpu")), torch.tensor([[[1.0], [2.0], [3.0]]]), None
    ).flatten().tolist() == [1.0, 3.0]

"""Tokens become text piece by piece: nothing is lost, nothing is broken, and stop texts never show."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dropflow_lab.serve.pieces import Pieces

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = Tokenizer(models.BPE({character: i for i, character in enumerate(ALPHABET)}, []))
BYTES.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BYTES.decoder = decoders.ByteLevel()


def decode(tokens: Sequence[int]) -> str:
    return str(BYTES.decode(list(tokens)))


def pieces_of(text: str, stops: Sequence[str] = ()) -> list[str]:
    pieces = Pieces(decode, stops)
    return [pieces.push(token) for token in BYTES.encode(text).ids] + [pieces.end()]


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
def test_all_pieces_together_are_the_text(text: str) -> None:
    found = pieces_of(text)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_a_character_of_several_tokens_comes_whole() -> None:
    assert pieces_of("a\U0001f600b") == ["a", "", "", "", "\U0001f600", "b", ""]


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    pieces = Pieces(decode)
    broken = BYTES.encode("\U0001f600").ids[:2]
    assert [pieces.push(token) for token in broken] == ["", ""]
    assert pieces.end() == decode(broken)


@settings(deadline=None, max_examples=300)
@given(st.text("ab\u00e9", max_size=12), st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    places = [text.find(stop) for stop in stops if stop in text]
    first_seen = "".join(pieces_of(text, stops))
    if not places:
        assert first_seen == text
    else:  # the stop text that is complete first ends the answer; one that begins earlier may be complete later
        assert text.startswith(first_seen)
        assert first_seen in {text[:place] for place in places}
        assert not any(stop in first_seen for stop in stops)


def test_what_may_begin_a_stop_text_is_held_back() -> None:
    assert pieces_of("a\nUsed\nUser: b", ["\nUser:"]) == [
        "a", "", "", "", "", "\nUsed", "", "", "", "", "", "", "", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize(("stop", "stopped"), [("b", True), ("c", False)])
def test_it_says_whether_a_stop_text_was_found(stop: str, stopped: bool) -> None:
    pieces = Pieces(decode, [stop])
    for token in BYTES.encode("ab").ids:
        pieces.push(token)
    assert pieces.stopped is stopped

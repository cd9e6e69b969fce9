"""A stage's answer of the wrong type or length is refused by name: it is neither misread nor an error of Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from tiny import policy, prompt

import dropflow
from dropflow import CacheKeep, Encode, Exit, Keep, Stage, hookimpl
from dropflow.errors import DecisionError


def answering(hook: str, answer: Callable[[Any], Any]) -> type[Stage[Any]]:
    """A stage with one hook that answers with what `answer` makes of its payload."""

    def method(_: Any, call: Any) -> Any:
        return answer(call)

    method.__name__ = hook
    return type("Answering", (Stage,), {hook: hookimpl(method), "prune_at": (2,) if hook == "prune" else ()})


def none(call: Any) -> torch.Tensor:
    return torch.zeros_like(call.places[0], dtype=torch.bool)


def every(call: Any) -> torch.Tensor:
    return torch.ones_like(call.valid)


WRONG: list[tuple[str, Callable[[Any], Any], str]] = [
    ("encode", none, "`encode` answered Tensor, expected `Encode` or `None`"),
    ("encode", lambda call: Keep(none(call)), "`encode` answered Keep, expected `Encode` or `None`"),
    (
        "encode",
        lambda call: Encode(keep=(none(call),)),
        "returned `keep` of length 1, expected a tensor for each of the 3",
    ),
    ("encode", lambda call: Encode(keep=(none(call),) * 4), "returned `keep` of length 4, expected"),
    ("encode", lambda _: Encode(keep=(None,) * 3), "returned `keep` of length 3, expected a tensor"),
    ("encode", lambda call: Encode(protect=(none(call),)), "returned `protect` of length 1, expected"),
    ("encode", lambda call: Encode(protect=(none(call),) * 4), "returned `protect` of length 4, expected"),
    ("encode", lambda call: Encode(rows=call.features * 2, places=call.places * 2), "returned `rows` of length 6,"),
    ("encode", lambda call: Encode(rows=call.features, places=call.places[:1]), "returned `places` of length 1,"),
    ("inject", lambda _: 2.5, "`inject` answered float, expected a whole number or `None`"),
    ("inject", lambda _: True, "`inject` answered bool, expected a whole number or `None`"),
    ("inject", lambda _: Exit(2), "`inject` answered Exit, expected a whole number or `None`"),
    ("exit", lambda _: "4", "`exit` answered str, expected a whole number, `Exit` or `None`"),
    ("exit", lambda _: Exit(2.5), "`exit` answered 2.5, expected a boundary from 0 to 6"),  # type: ignore[arg-type]  # on purpose
    ("prune", every, "`prune` answered Tensor, expected `Keep` or `None`"),
    ("prune", lambda call: Keep(every(call).tolist()), "`prune` returned list as `mask`, expected a tensor"),
    ("prune", lambda call: Keep(every(call), notes=3), "`prune` returned int as `notes`, expected a tensor"),  # type: ignore[arg-type]  # on purpose
    ("prune", lambda call: Keep(every(call), weights=[1]), "`prune` returned list as `weights`"),  # type: ignore[arg-type]  # on purpose
    ("prune", lambda call: Keep(every(call), scores=torch.ones(3)), r"returned scores of \(3,\), expected"),
    ("decode_cache", lambda _: {0: None}, "answered dict, expected `CacheKeep`, `CacheSelect` or `None`"),
    ("decode_cache", lambda _: CacheKeep([]), "answered list as `keep`, expected a mapping from layers to tensors"),  # type: ignore[arg-type]  # on purpose
    ("decode_cache", lambda _: CacheKeep({0: [True]}), "answered list for layer 0, expected a tensor"),  # type: ignore[dict-item]  # on purpose
]


@pytest.mark.parametrize(("hook", "answer", "said"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_answer_is_refused_by_name(llava: Any, hook: str, answer: Callable[[Any], Any], said: str) -> None:
    inputs = prompt()
    with torch.no_grad():
        plain = llava(**inputs).logits
        with (
            dropflow.attach(llava, policy(bad={"use": answering(hook, answer)})),
            pytest.raises(DecisionError, match=rf"stages\.bad: .*{said}"),
        ):
            llava(**inputs)
        assert torch.equal(llava(**inputs).logits, plain)


@pytest.mark.parametrize("boundary", [numpy.int64(2), torch.tensor(2)])
def test_any_whole_number_is_a_boundary(llava: Any, boundary: Any) -> None:
    with torch.no_grad(), dropflow.attach(llava, policy(late={"use": answering("inject", lambda _: boundary)})) as flow:
        llava(**prompt())
        assert [bool(layer.visual_tokens) for layer in flow.report().layers] == [False] * 2 + [True] * 4

"""Arguments and stage properties of a wrong type are refused in one error that says what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import HIDROP, RAGGED, policy, prompt

import dropflow
from dropflow import Forecast, Stage, StageOptions, hookimpl
from dropflow.errors import PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.testing.probes import use


def opened(block: Any) -> None:
    with block:
        pass


def attached(model: Any, act: Callable[[Any], Any], which: Any = RAGGED) -> None:
    with dropflow.attach(model, which) as flow:
        act(flow)


SET = "attach_set: expected a mapping of names to policies, got "
NUMBER = "limit: expected a positive number of bytes, got "
PROGRESS = "progress: expected a number from 0 to 1, got "
QUESTIONS = "questions: expected one string per sample, such as ['What is this?'], got "
VIDEOS = "such as [[0, 1, 2], [4, 5]], got "
OVERRIDES = "overrides: expected a list of path=value, such as ['stages.pyramid.keep.10=343'], got "
CALLS: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    *(
        (lambda _, limit=limit: dropflow.Prefixes(limit=limit), ValueError, f"{NUMBER}{limit!r}")
        for limit in ("x", None, True, 0, -1, float("nan"), [1])
    ),
    *(
        (
            lambda m, tokens=tokens: attached(m, lambda f: f.prefix(tokens=tokens, **prompt(((3, "I", 5),)))),
            UnsupportedCall,
            f"prefix: expected `tokens` as a whole number, got {tokens!r}; leave it out",
        )
        for tokens in ("x", 2.5, True)
    ),
    *(
        (lambda m, done=done: attached(m, lambda f: setattr(f, "progress", done)), ValueError, f"{PROGRESS}{done!r}")
        for done in ("x", None, True, float("nan"), 2)
    ),
    *(
        (
            lambda m, mask=mask: attached(m, lambda f: opened(f.visual(mask))),
            UnsupportedCall,
            f"visual: expected a torch.bool tensor (batch, tokens), got {got}",
        )
        for mask, got in (([True], "[True]"), (None, "None"), (torch.ones(2), "torch.float32 (2,)"))
    ),
    *(
        (
            lambda m, keeps=keeps: attached(m, lambda f: opened(f.replay(keeps))),
            UnsupportedCall,
            f"replay: expected `Keeps` of `flow.keeps()`, one for each sample, got {keeps!r}; read plain data",
        )
        for keeps in (3, None, [{"entry": 0}])
    ),
    *(
        (lambda _, texts=texts: opened(dropflow.questions(texts)), TypeError, QUESTIONS + got)
        for texts, got in ((3, "3"), (None, "None"), ("What?", "a single string"), ([3], "[3]"))
    ),
    *(
        (lambda _, frames=frames: opened(dropflow.videos(frames)), ValueError, f"{VIDEOS}{frames!r}")
        for frames in (3, None, "x", [3], [["x"]], [[1.5]], [[0, 0]], [[-1]], [[]])
    ),
    *(
        (
            lambda _, mask=mask: opened(dropflow.instruction_tokens(mask)),
            UnsupportedCall,
            "instruction_tokens: expected either a mask or `labels`, a tensor (batch, tokens)",
        )
        for mask in (3, "x", [True], torch.ones(2))
    ),
    *(
        (lambda _, given=given: dropflow.load_policy(HIDROP, given), PolicyError, f"{OVERRIDES}{given!r}")
        for given in (3, "stages.inject.at=2")
    ),
    (lambda m: dropflow.attach(m, HIDROP, overrides=[3]), PolicyError, "3: an override is written path=value"),
    (lambda m: dropflow.attach_set(m, ["a"], default="a"), PolicyError, f"{SET}['a']; give each policy a name"),
    (lambda m: dropflow.attach_set(m, {1: HIDROP}, default=1), PolicyError, f"{SET}{{1: "),
    (
        lambda m: dropflow.attach_set(m, {"a": HIDROP}, default=["a"]),
        PolicyError,
        "attach_set: the default ['a'] is not among the policies; name one of a",
    ),
    (
        lambda m: opened(dropflow.attach_set(m, {"a": HIDROP}, default="a").using(["a"])),
        UnsupportedCall,
        "using: no policy ['a'] in this set",
    ),
    (
        lambda m: dropflow.attach(m, HIDROP, adapter=3),
        UnsupportedModel,
        "adapter: expected a registered name or a Backbone subclass, got 3",
    ),
]


@pytest.mark.parametrize(("call", "error", "expected"), CALLS, ids=[text for *_, text in CALLS])
def test_a_wrong_argument_is_refused(llava: Any, call: Callable[[Any], Any], error: type[Exception], expected: str):
    try:
        with pytest.raises(error, match=re.escape(expected)):
            call(llava)
    finally:
        dropflow.detach(llava)


LAYERS = "a tuple of decoder layers, such as (2,)"
PLACES = "a tuple of places on the vision side, such as (None,) or ('features',)"
PROPERTIES = [
    *((name, value, LAYERS) for name in ("taps", "decode_taps", "decode_reads_at") for value in (2, None, "2", (2.0,))),
    *(("prune_at", value, "a tuple of boundaries, such as (2,)") for value in (2, None, "2", (True,))),
    *(("encode_at", value, PLACES) for value in (2, None, "features", ("feature",))),
    *(("vision_taps", value, "a tuple of layers of the vision encoder, such as (-2,)") for value in (-2, None, ("x",))),
    *((name, value, "a whole number from 0") for name in ("carries", "decode_every") for value in (None, "1", -1, 1.5)),
    *(("needs", value, "a set of facts, such as frozenset({'grid'})") for value in ("grid", ("grid",), None, {1})),
]


@pytest.mark.parametrize(("name", "value", "expected"), PROPERTIES)
def test_a_property_of_a_stage_that_is_no_value_of_its_type_is_refused(
    llava: Any, name: str, value: Any, expected: str
) -> None:
    class Odd(Stage[StageOptions]):
        @hookimpl
        def decode_cache(self, call: Any) -> None: ...

    setattr(Odd, name, value)
    told = f"stages.odd: expected {expected} as `{name}` of Odd, got {value!r}"
    with pytest.raises(PolicyError) as caught:
        dropflow.attach(llava, policy(odd=use(Odd)))
    assert str(caught.value) == told
    assert dropflow.flow_of(llava) is None


def test_all_odd_properties_are_told_at_once(llava: Any) -> None:
    class Odd(Stage[StageOptions]):
        taps = 1
        decode_reads_at = 2

        @hookimpl
        def decode_cache(self, call: Any) -> None: ...

    with pytest.raises(PolicyError) as caught:
        dropflow.attach(llava, policy(odd=use(Odd)))
    assert [line.split("`")[1] for line in str(caught.value).splitlines()] == ["taps", "decode_reads_at"]


@pytest.mark.parametrize("given", [None, {}, {2: 3}])
def test_a_forecast_that_is_none_is_refused(llava: Any, given: Any) -> None:
    class Odd(Stage[StageOptions]):
        def forecast(self) -> Forecast:
            return given  # type: ignore[no-any-return]

        @hookimpl
        def inject(self, call: Any) -> int:
            return int(call.layers)

    with pytest.raises(PolicyError) as caught:
        dropflow.attach(llava, policy(odd=use(Odd)))
    assert str(caught.value) == f"stages.odd: expected a `Forecast` from `forecast` of Odd, got {given!r}"


def test_ranges_and_sets_of_layers_are_as_good_as_tuples(llava: Any) -> None:
    class Listed(Stage[StageOptions]):
        taps = frozenset({1})
        prune_at = range(2, 3)

        @hookimpl
        def decode_cache(self, call: Any) -> None: ...

    with dropflow.attach(llava, policy(listed=use(Listed))) as flow:
        stage = flow.plan.stages[0][1]
        assert (list(stage.prune_at), set(stage.taps)) == ([2], {1})

"""Arguments and stage properties of a wrong type are refused in one error that says what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDROP, RAGGED, policy, prompt
from transformers import DynamicCache, StaticCache

import dropflow
from dropflow import Forecast, Stage, StageOptions, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import PolicyError, UnknownName, UnsupportedCall, UnsupportedModel
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
POLICY = "policy: expected a name, a path, a mapping or a Policy, got "
GRID = "expected a patch grid (rows, columns), such as (24, 24), got "
GRID_OF = "square_grid: expected a number of tokens (an integer from 0), got "
SIDE = "patch_blocks: expected a side from 1 to 4, got "
KEEPS = "keeps: expected what `Keeps.to_dict` returns, got "
FACTS = "facts: expected a set of facts, such as frozenset({'grid'}), got "
ENCODES, SHAPE = policy(few={"use": "divprune/max-min", "keep": 2}), dropflow.BackboneShape(32, 576)
NONE: Any = None
UNHASHABLE: Any = [1]
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
    *(
        (
            lambda m, adapter=adapter, call=call: call(m, adapter),
            UnsupportedModel,
            f"adapter: expected a registered name or a Backbone subclass, got {adapter!r}",
        )
        for adapter in (3, [], False, int)
        for call in (
            lambda m, adapter: dropflow.attach(m, HIDROP, adapter=adapter),
            lambda m, adapter: dropflow.attach_set(m, {"a": HIDROP}, default="a", adapter=adapter),
            lambda m, adapter: dropflow.backbone_for(m, adapter),
            lambda _, adapter: dropflow.from_pretrained("org/model", HIDROP, adapter=adapter),
        )
    ),
    *(
        (
            lambda m, name=name: dropflow.attach(m, HIDROP, adapter=name),
            UnknownName,
            f"adapter: no adapter named {told}",
        )
        for name, told in (("lava", "'lava'; did you mean 'llava'"), ("", "''; valid: "))
    ),
    (
        lambda m: dropflow.attach(m, HIDROP, adapter="qwen2_5_vl"),
        UnsupportedModel,
        "adapter: 'qwen2_5_vl' does not fit LlavaForConditionalGeneration ('LlavaModel' object has no attribute",
    ),
    *(
        (lambda m, source=source, call=call: call(m, source), PolicyError, f"{POLICY}{source!r}")
        for source in (3, [], "", True, 1.5, b"hidrop-64", dropflow.Policy)
        for call in (
            lambda _, source: dropflow.load_policy(source),
            lambda m, source: dropflow.attach(m, source),
            lambda m, source: dropflow.attach_set(m, {"a": HIDROP, "b": source}, default="a"),
            lambda _, source: dropflow.from_pretrained("org/model", source),
        )
    ),
    (lambda _: dropflow.load_policy(NONE), PolicyError, f"{POLICY}None"),
    (
        lambda _: dropflow.load_policy("fastv-k2-r5"),
        PolicyError,
        "fastv-k2-r5: no such policy; did you mean 'fastv-k2-r",
    ),
    *(
        (
            lambda m, name=name, value=value: dropflow.attach(m, HIDROP, **{name: value}),
            ValueError,
            f"{name}: expected True or False, got {value!r}",
        )
        for name in ("overlap", "allow_downloads")
        for value in ("no", None, 1)
    ),
    (
        lambda m: dropflow.attach_set(m, {"a": HIDROP}, default="a", overlap=NONE),
        ValueError,
        "overlap: expected True or False, got None",
    ),
    (lambda m: dropflow.attach_set(m, {}, default="a"), PolicyError, f"{SET}{{}}; give each policy a name"),
    *(
        (
            lambda _, folder=folder: dropflow.from_pretrained(folder, HIDROP),
            UnsupportedModel,
            f"folder: expected a model folder or the name of a model, got {folder!r}",
        )
        for folder in (3, None, "", ["a"])
    ),
    *(
        (
            lambda _, folder=folder: dropflow.from_pretrained(folder),
            UnsupportedModel,
            f"folder: {str(folder)!r}: no such folder; name one with a config.json",
        )
        for folder in ("/no/such", "./none", Path("none"), "~/none/at/all")
    ),
    *(
        (
            lambda _, made=made: dropflow.from_pretrained("org/model", HIDROP, model_class=made),
            UnsupportedModel,
            f"model_class: expected a class with `from_pretrained`, such as AutoModelForImageTextToText, got {made!r}",
        )
        for made in (3, None, "LlavaForConditionalGeneration")
    ),
    (
        lambda _: dropflow.from_pretrained("org/model", "hidrop-65"),
        PolicyError,
        "hidrop-65: no such policy; did you mean",
    ),
    (lambda _: dropflow.from_pretrained("org/model", HIDROP, overrides=NONE), PolicyError, f"{OVERRIDES}None"),
    *(
        (
            lambda _, cache=cache: dropflow.parked_bytes(cache),
            UnsupportedModel,
            f"parked_bytes: expected a cache, got {type(cache).__name__}; pass the `{CACHE_ARGUMENT}`",
        )
        for cache in (None, 3, ((1, 2),), {})
    ),
    *(
        (lambda _, tokens=tokens: dropflow.square_grid(tokens), ValueError, f"{GRID_OF}{tokens!r}")
        for tokens in (None, -1, 2.0, "4")
    ),
    *(
        (
            lambda _, entries=entries: dropflow.feature_boundary(entries, 3),
            ValueError,
            f"feature_boundary: expected a hidden state or several, such as -2, got {entries!r}",
        )
        for entries in (None, [], ["x"], 1.5)
    ),
    (lambda _: dropflow.one_to_one(NONE), ValueError, "one_to_one: expected the number of rows of each entry"),
    *(
        (lambda _, grid=grid: dropflow.patch_blocks(grid, 2), ValueError, f"patch_blocks: {GRID}{grid!r}")
        for grid in (3, None, (4,), "44", (2, -1))
    ),
    *(
        (lambda _, side=side: dropflow.patch_blocks((4, 6), side), ValueError, f"{SIDE}{side!r}")
        for side in (0, 9, None, 1.0)
    ),
    *(
        (lambda _, given=given: dropflow.Budget(**given), ValueError, f"Budget: {told}")
        for given, told in (
            ({"tokens": 3, "share": 0.5}, "expected either `tokens` or `share`, got 3 and 0.5"),
            ({"tokens": "x"}, "expected `tokens` as an integer from 0, got 'x'"),
            ({"tokens": -3}, "expected `tokens` as an integer from 0, got -3"),
            ({"tokens": 1.5}, "expected `tokens` as an integer from 0, got 1.5"),
            ({"share": 0.0}, "expected `share` as a number above 0, got 0.0"),
            ({"share": 0.5, "rounding": "cell"}, "no `rounding` 'cell'; did you mean 'ceil'?"),
        )
    ),
    (
        lambda _: dropflow.Prefixes(10).get(UNHASHABLE, lambda: NONE),
        ValueError,
        "key: expected a hashable value, such as a digest of the images, got [1]",
    ),
    (
        lambda _: dropflow.Prefixes(10).get("a", NONE),
        ValueError,
        "make: expected a function that returns a prefix, got ",
    ),
    (
        lambda _: dropflow.Prefixes(10).get("a", lambda: NONE),
        ValueError,
        "make: expected what `flow.prefix` returns, got",
    ),
    *(
        (lambda _, data=data: dropflow.Keeps.from_dict(data), UnsupportedCall, f"{KEEPS}{data!r}")
        for data in (3, None, [])
    ),
    *(
        (
            lambda m, asked=asked: attached(m, lambda f: getattr(f, asked)()),
            UnsupportedCall,
            f"{asked}: no prompt with images has run since the policy was attached; run one first",
        )
        for asked in ("report", "live", "merges", "keeps")
    ),
    (lambda _: dropflow.EncodeOnly(ENCODES, NONE), ValueError, "shape: expected the model's BackboneShape, got None"),
    *(
        (lambda _, facts=facts: dropflow.EncodeOnly(ENCODES, SHAPE, facts), ValueError, f"{FACTS}{facts!r}")
        for facts in (3, "grid", ["grid"])
    ),
    (lambda _: dropflow.EncodeOnly(ENCODES, SHAPE).tokens(NONE), ValueError, f"grid: {GRID}None"),
    *(
        (lambda _, given=given: dropflow.EncodeOnly(ENCODES, SHAPE).reduce(*given), ValueError, told)
        for given, told in (
            ((3, [(2, 2)]), "features: expected a tensor (rows, dim) for each image, got 3"),
            (([torch.ones(4)], [(2, 2)]), "features: expected a tensor (rows, dim) for each image, got [tensor("),
            (([torch.ones(4, 3)], []), "grids: expected one for each of 1 images, got []"),
            (([torch.ones(4, 3)], [3]), f"grids[0]: {GRID}3"),
            (([torch.ones(4, 3)], [(3, 3)]), "grids[0]: 3 x 3 patches, but its features have 4 rows"),
        )
    ),
]


@pytest.mark.parametrize(("call", "error", "expected"), CALLS, ids=[text[:80] for *_, text in CALLS])
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


@pytest.mark.parametrize("package", [dropflow, dropflow.operators])
def test_python_can_say_which_name_of_the_package_is_close(package: Any) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'keep_tpo'") as caught:
        _ = package.keep_tpo
    assert (caught.value.name, caught.value.obj) == ("keep_tpo", package)


class Trained(Stage[StageOptions]):
    """A stage with a module."""

    prune_at = (2,)

    def build_module(self, source: Any) -> torch.nn.Module:  # noqa: ARG002
        return torch.nn.Linear(2, 2)

    @hookimpl
    def prune(self, call: Any) -> None: ...


@pytest.mark.parametrize("wrong", [3, ["a"]])
def test_weights_of_a_wrong_type_are_refused(llava: Any, wrong: Any) -> None:
    with pytest.raises(PolicyError, match="weights: expected a safetensors file, or a folder with one, got"):
        dropflow.attach(llava, policy(own=use(Trained)), weights=wrong)
    llava.train()
    with dropflow.attach(llava, policy(own=use(Trained))) as flow:
        with pytest.raises(UnsupportedCall, match="save_stages: expected a folder, got"):
            flow.save_stages(wrong)
        with pytest.raises(UnsupportedCall, match="load_stages: expected a folder or a safetensors file, got"):
            flow.load_stages(wrong)


def test_caches_on_which_nothing_is_parked_hold_no_parked_bytes(llava: Any) -> None:
    for cache in (DynamicCache(), StaticCache(llava.config.text_config, max_cache_len=8)):
        assert dropflow.parked_bytes(cache) == 0

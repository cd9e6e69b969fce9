"""Parked entries: a decode step reads what a stage chooses, and nothing of it outlives the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import RAGGED, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import DynamicCache, StaticCache

import dropflow
from dropflow import CacheCall, CacheKeep, CacheSelect, Stage, StageOptions, StepCall, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import DecisionError, PolicyError, UnsupportedModel

BUDGET: dict[str, Any] = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
TWO = ((3, "I", 5), ("I", 2, "I", 9))


class ReadOptions(StageOptions):
    """Options of `Reads`."""

    at: int = 2
    every: int = 3
    from_layer: int | None = None


class Reads(Stage[ReadOptions]):
    """Reads every third visual entry, counted within its sample, and others at every step."""

    Options = ReadOptions

    @property
    def decode_reads_at(self) -> tuple[int, ...]:
        return (self.options.at,)

    @hookimpl
    def decode_cache(self, call: StepCall) -> CacheSelect:
        assert call.layer == self.options.at
        numbers = call.visual.cumsum(1)
        return CacheSelect((numbers + call.step) % self.options.every == 0, self.options.from_layer)


def reading(**options: Any) -> dict[str, Any]:
    return policy(reads={"use": Reads, **options})


def stage(decide: Callable[[StepCall], Any], layers: Sequence[int] = (2,)) -> type[Stage[StageOptions]]:
    class Own(Stage[StageOptions]):
        """Decides as told."""

        @property
        def decode_reads_at(self) -> tuple[int, ...]:
            return tuple(layers)

        @hookimpl
        def decode_cache(self, call: StepCall) -> Any:
            return decide(call)

    return Own


def active_tokens(visual: Tensor, step: int, every: int) -> Tensor:
    """What `Reads` reads of the logical tokens, text included."""
    return ~visual | ((visual.cumsum(1) + step) % every == 0)


@contextmanager
def parked(model: Any, visual: Tensor, first: int, every: int = 3) -> Iterator[None]:
    """Hide by hand, from layer `first` on of every call of one token, what `Reads` parks."""

    def hide(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        if mask is None or mask.shape[2] != 1:
            return args, kwargs
        step = mask.shape[3] - visual.shape[1]
        seen = torch.nn.functional.pad(active_tokens(visual, step, every), (0, step), value=True)
        hidden = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask.masked_fill(~seen[:, None, None], hidden)}

    layers = list(model.get_decoder().layers)[first:]
    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


def decoded(model: Any, inputs: dict[str, Tensor], steps: int = 6) -> tuple[list[Tensor], Any]:
    """Logits of the prefill and of steps that feed given tokens, and the cache."""
    cache, mask = DynamicCache(), inputs["attention_mask"]
    found = [model(**inputs, **{CACHE_ARGUMENT: cache}).logits[:, -1]]
    for step in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        token = torch.full((len(mask), 1), 5 + step)
        found.append(model(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits[:, -1])
    return found, cache


@pytest.mark.parametrize("from_layer", [None, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_step_equals_one_in_which_parked_entries_are_hidden(attention: str, from_layer: int | None) -> None:
    inputs = prompt(TWO)
    visual = inputs["input_ids"] == 98
    with parked(tiny := tiny_llava(attention="eager"), visual, from_layer or 2):
        expected, dense = decoded(tiny, inputs)
    plain, _ = decoded(tiny_llava(attention="eager"), inputs)
    model = tiny_llava(attention=attention)
    with dropflow.attach(model, reading(from_layer=from_layer)):
        found, cache = decoded(model, inputs)
    for step, (own, hidden, without) in enumerate(zip(found, expected, plain, strict=True)):
        assert relative_error(own, hidden) < 1e-5, step
        assert (relative_error(own, without) > 1e-4) == (step > 0)
    real = torch.nn.functional.pad(inputs["attention_mask"].bool(), (0, 6), value=True)
    for layer, full in zip(cache.layers, dense.layers, strict=True):  # nothing is lost
        own, other = (keys.transpose(1, 2)[real] for keys in (layer.keys, full.keys))
        assert relative_error(own, other) < 1e-5


@torch.no_grad()
def test_reading_everything_has_the_bits_of_the_plain_model(llava: Any) -> None:
    inputs = prompt()
    plain, full = decoded(llava, inputs)
    with dropflow.attach(llava, policy(reads={"use": stage(lambda call: CacheSelect(call.view.valid))})):
        found, cache = decoded(llava, inputs)
    assert all(map(torch.equal, found, plain))
    for layer, other in zip(cache.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


@torch.no_grad()
def test_a_sample_reads_the_same_alone_and_in_a_batch(llava: Any) -> None:
    inputs = prompt(TWO)
    with dropflow.attach(llava, reading()):
        together, _ = decoded(llava, inputs)
        for row, own in enumerate(inputs["attention_mask"].bool()):
            single = {name: inputs[name][row : row + 1, own] for name in ("input_ids", "attention_mask")}
            images = [[0], [1, 2]][row]
            alone, _ = decoded(llava, single | {"pixel_values": inputs["pixel_values"][images]})
            for both, one in zip(together, alone, strict=True):
                assert relative_error(both[row : row + 1], one) < 1e-5


@torch.no_grad()
def test_layers_that_hold_less_read_what_they_hold_of_it(llava: Any) -> None:
    """After pruning in the prefill, an entry is read if the layer holds it and the stage chose it."""
    seen: list[Tensor] = []

    def choose(call: StepCall) -> CacheSelect:
        active = call.view.index % 2 == 0
        seen.append(call.view.index[active & call.visual])
        return CacheSelect(active)

    stages = policy(**RAGGED["stages"])["stages"]
    with dropflow.attach(llava, policy(**stages, reads={"use": stage(choose, (1,))})) as flow:
        _, cache = decoded(llava, prompt(((3, "I", 5),)), 1)
        report = flow.report()
    (chosen,) = seen
    for number, layer in enumerate(cache.layers):
        index = layer.full_index()
        there = (index.image_id >= 0) & (torch.isin(index.logical, chosen) | (number < 1))
        text = (index.image_id < 0).sum()
        assert report.layers[number].kv_entries_read == int(there.sum() + text)
    assert report.layers[5].kv_entries_read < report.layers[1].kv_entries_read < report.layers[0].kv_entries_read


@torch.no_grad()
def test_beams_samples_and_drafts(llava: Any) -> None:
    inputs = prompt(((3, "I", 5), (2, "I", 9)))
    with dropflow.attach(llava, reading()):
        greedy = llava.generate(**inputs, **BUDGET)
        beams = llava.generate(**inputs, **(BUDGET | {"num_beams": 3}))
        for row in range(2):
            own = {name: value[row : row + 1] for name, value in inputs.items()}
            own["input_ids"], own["attention_mask"] = (
                own[name][:, inputs["attention_mask"][row].bool()] for name in ("input_ids", "attention_mask")
            )
            alone = llava.generate(**own, **(BUDGET | {"num_beams": 3}))
            assert torch.equal(alone[0, -7:], beams[row, -7:])
        assert torch.equal(llava.generate(**inputs, **BUDGET), greedy)
        one = {name: value[1:] for name, value in inputs.items()}
        first = prompt(((3, "I", 5),))
        steps: list[int] = []
    which = policy(reads={"use": stage(lambda call: steps.append(call.step))})
    with dropflow.attach(llava, which):
        expected = llava.generate(**first, **BUDGET)
        assert steps == [1, 2, 3, 4, 5, 6]
        assert torch.equal(llava.generate(**first, **BUDGET, prompt_lookup_num_tokens=3), expected)
    assert one


@torch.no_grad()
def test_a_call_of_several_tokens_reads_everything(llava: Any) -> None:
    inputs, more = prompt(((3, "I", 5),)), torch.tensor([[4, 5, 6]])
    found = []
    for which in (reading(), policy(reads={"use": stage(lambda _: None)})):
        with dropflow.attach(llava, which):
            cache = DynamicCache()
            llava(**inputs, **{CACHE_ARGUMENT: cache})
            found.append(llava(input_ids=more, **{CACHE_ARGUMENT: cache}).logits)
    assert torch.equal(*found)


@torch.no_grad()
def test_a_later_choice_replaces_the_stages_own_and_joins_those_of_others(llava: Any) -> None:
    inputs = prompt(((3, "I", 5),))
    counts = []

    def count(which: Any) -> None:
        with dropflow.attach(llava, which) as flow:
            decoded(llava, inputs, 1)
            counts.append([row.kv_entries_read - 10 for row in flow.report().layers])

    def by(divisor: int) -> Callable[[StepCall], CacheSelect]:
        return lambda call: CacheSelect(call.visual.cumsum(1) % divisor == 0)

    count(policy(a={"use": stage(lambda call: by(2 if call.layer == 1 else 4)(call), (1, 3))}))
    count(policy(a={"use": stage(by(2), (1,))}, b={"use": stage(by(3), (4,))}))
    count(policy(a={"use": stage(lambda call: by(2)(call) if call.layer == 1 else None, (1, 3))}))
    assert counts == [[16, 8, 8, 4, 4, 4], [16, 8, 8, 8, 2, 2], [16, 8, 8, 16, 16, 16]]


@torch.no_grad()
def test_a_choice_holds_until_the_stages_next_one_begins(llava: Any) -> None:
    """Of choices that begin later than where they are made, each layer takes the last that has begun."""
    inputs = prompt(((3, "I", 5),))

    def counts(*answers: tuple[int, int, int]) -> list[float]:
        """Entries that layers read, where the stage answers (divisor, first layer) in some layers."""
        told = {layer: (divisor, first) for layer, divisor, first in answers}

        def choose(call: StepCall) -> CacheSelect:
            divisor, first = told[call.layer]
            return CacheSelect(call.visual.cumsum(1) % divisor == 0, first)

        with dropflow.attach(llava, policy(a={"use": stage(choose, tuple(told))})) as flow:
            decoded(llava, inputs, 1)
            return [row.kv_entries_read - 10 for row in flow.report().layers]

    assert counts((1, 2, 1), (2, 4, 4)) == [16, 8, 8, 8, 4, 4]
    assert counts((1, 2, 5), (2, 4, 3)) == [16, 16, 16, 4, 4, 4]
    assert counts((1, 2, 6)) == [16] * 6


@torch.no_grad()
def test_rows_read_by_another_stage_are_those_of_what_was_read(llava: Any) -> None:
    rows: list[Tensor] = []

    class Watches(Stage[StageOptions]):
        """Reads attention rows of decode steps."""

        decode_every = 1  # type: ignore[assignment]
        decode_taps = (4,)  # type: ignore[assignment]

        @hookimpl
        def decode_cache(self, call: CacheCall) -> CacheKeep | None:
            if call.step:
                rows.append(call.attention_rows(4, call.last_rows)[:, :, 0])
                assert rows[-1].shape[2] == call.layers[4].index.shape[1]
            return None

    inputs = prompt(((3, "I", 5),))
    with dropflow.attach(llava, policy(reads={"use": Reads}, watches={"use": Watches})):
        decoded(llava, inputs, 3)
    visual = inputs["input_ids"] == 98
    for step, row in enumerate(rows, start=1):
        active = torch.nn.functional.pad(active_tokens(visual, step, 3), (0, step), value=True)
        assert torch.equal(row > 0, active[:, None].expand_as(row))
        assert torch.allclose(row.sum(2), torch.ones(1, row.shape[1]))


@torch.no_grad()
def test_logits_are_what_the_softmax_gets(llava: Any) -> None:
    found: list[Tensor] = []
    inputs = prompt(TWO)
    with dropflow.attach(llava, policy(reads={"use": stage(lambda call: found.append(call.logits()))})):
        decoded(llava, inputs, 1)
    eager, cache, mask = tiny_llava(attention="eager"), DynamicCache(), inputs["attention_mask"]
    eager(**inputs, **{CACHE_ARGUMENT: cache})
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    maps = eager(
        input_ids=torch.full((2, 1), 5),
        attention_mask=mask,
        output_attentions=True,
        **{CACHE_ARGUMENT: cache},
    ).attentions
    assert found[0].dtype == torch.float32
    assert relative_error(found[0].softmax(2), maps[2][:, :, 0]) < 1e-5


@torch.no_grad()
def test_an_interrupted_step_leaves_nothing(llava: Any) -> None:
    inputs, token = prompt(((3, "I", 5),)), torch.tensor([[5]])
    plain = llava(**inputs).logits

    def stop(_: StepCall) -> CacheSelect:
        raise KeyboardInterrupt

    with dropflow.attach(llava, policy(reads={"use": stage(stop)})):
        cache = DynamicCache()
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        with pytest.raises(KeyboardInterrupt):
            llava(input_ids=token, **{CACHE_ARGUMENT: cache})
        assert torch.equal(llava(**inputs).logits, plain)
    assert torch.equal(llava(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda call: CacheSelect(call.view.valid[:, :-1]), "one value per entry"),
        (lambda call: CacheSelect(call.view.valid.float()), r"torch\.float32"),
        (lambda call: CacheSelect(call.view.valid, from_layer=1), "the others have run"),
        (lambda call: CacheKeep({call.layer: call.view.valid}), "expected `CacheSelect`"),
        (lambda call: CacheSelect(call.view.valid.tolist()), "answered list"),
        (lambda call: CacheSelect(call.view.valid.to_sparse()), r"sparse_coo on cpu .* expected a dense"),
        (lambda call: CacheSelect(call.view.valid.to("meta")), r"strided on meta .* expected a dense"),
        (lambda call: CacheSelect(call.view.valid, from_layer=7), r"`from_layer` 7 .* from 2, .* to 6"),
        (lambda call: CacheSelect(call.view.valid, from_layer=3.5), r"`from_layer` 3\.5"),
        (lambda call: CacheSelect(call.view.valid, from_layer=True), "`from_layer` True"),
    ],
)
@torch.no_grad()
def test_answers_that_make_no_sense(llava: Any, answer: Any, told: str) -> None:
    with (
        dropflow.attach(llava, policy(reads={"use": stage(answer)})),
        pytest.raises(DecisionError, match=rf"stages\.reads: .*{told}"),
    ):
        decoded(llava, prompt(((3, "I", 5),)), 1)


@torch.no_grad()
def test_a_stage_may_call_a_model_of_its_own(llava: Any) -> None:
    inputs, other = prompt(((3, "I", 5),)), tiny_llava(seed=5)
    expected = other(**inputs).logits
    found: list[Tensor] = []

    def choose(call: StepCall) -> CacheSelect:
        found.append(other(**inputs).logits)
        return CacheSelect((call.visual.cumsum(1) + call.step) % 3 == 0)

    with dropflow.attach(llava, reading()):
        alone, _ = decoded(llava, inputs, 3)
    with dropflow.attach(llava, policy(reads={"use": stage(choose)})):
        both, _ = decoded(llava, inputs, 3)
    assert all(map(torch.equal, both, alone))
    assert len(found) == 3
    assert all(torch.equal(own, expected) for own in found)
    with dropflow.attach(other, reading(every=2)), dropflow.attach(llava, policy(reads={"use": stage(choose)})):
        both, _ = decoded(llava, inputs, 3)
    assert all(map(torch.equal, both, alone))


def test_stages_that_would_not_be_asked_are_refused(llava: Any) -> None:
    class Nothing(Stage[StageOptions]):
        """Chooses nowhere."""

        decode_reads_at = (2,)  # type: ignore[assignment]

        @hookimpl
        def exit(self, call: Any) -> None: ...

    class Both(Reads):
        decode_every = 2  # type: ignore[assignment]

    class Taps(Reads):
        decode_taps = (3,)  # type: ignore[assignment]

    for use, told in ((Nothing, "has no `decode_cache`"), (Both, "nowhere else"), (Taps, "nowhere else")):
        with pytest.raises(PolicyError, match=rf"stages\.reads: .*{told}"):
            dropflow.attach(llava, policy(reads={"use": use}))


@torch.no_grad()
def test_a_selection_after_the_prefill_is_refused(llava: Any) -> None:
    class Wrong(Stage[StageOptions]):
        """Chooses where it may only evict."""

        @hookimpl
        def decode_cache(self, call: CacheCall) -> Any:
            return CacheSelect(call.layers[0].valid)

    with (
        dropflow.attach(llava, policy(wrong={"use": Wrong})),
        pytest.raises(DecisionError, match="list a layer in `decode_reads_at`"),
    ):
        llava(**prompt())


def test_layers_that_do_not_exist_and_static_caches_are_refused(llava: Any) -> None:
    with pytest.raises(PolicyError, match="names layer 6, expected 0 to 5"):
        dropflow.attach(llava, reading(at=6))
    static = StaticCache(llava.config.get_text_config(), max_cache_len=64)
    with (
        torch.no_grad(),
        dropflow.attach(llava, reading()),
        pytest.raises(UnsupportedModel, match=r"use transformers. DynamicCache"),
    ):
        llava(**prompt(((3, "I", 5),)), **{CACHE_ARGUMENT: static})

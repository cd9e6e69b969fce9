"""With threads, forks and other models alongside an attached one, every call is correct or refused by name."""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from interrupts import ERRORS, Worker, exit_code, in_child, leave
from tiny import HIDROP, RAGGED, policy, prompt, tiny_llava
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dropflow
from dropflow import Encode, EncodeCall, Flow, FlowSet, Keep, PruneCall, Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.attach.model_hooks import ModelHooks
from dropflow.engine.vision.encoding import in_force
from dropflow.errors import DropflowError, PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.testing.guarantees import fingerprint

T = TypeVar("T")
BUDGET = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
FASTV = policy(ahead={"use": "fastv/attention-rank", "at": 1, "keep": 1})
TOME = policy(merge={"use": "tome/token-merging", "r": 3, "layers": 3})
ENCODING = {
    "tome": TOME,
    "key-set": policy(keys={"use": "mustdrop/key-set", "share": 0.2}, **HIDROP["stages"]),
    "visionzip": policy(zip={"use": "visionzip/dominant-contextual", "dominant": 4, "contextual": 2}),
    "prumerge": policy(merge={"use": "prumerge/prune-merge"}),
}
PROMPTS = [
    prompt(samples, seed=seed)
    for seed, samples in enumerate((((3, "I", 5),), (("I", 2, "I", 9), (4, "I", 3)), ((2, "I", 8),), (("I", "I", 2),)))
]
"""One prompt for each thread."""
INPUTS = PROMPTS[0]


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Make Python switch threads every ten microseconds, to expose races."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Any] = INPUTS) -> Tensor:
    """Logits of a prompt."""
    logits: Tensor = model(**inputs).logits
    return logits


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Any] = INPUTS) -> Tensor:
    """Generated tokens."""
    tokens: Tensor = model.generate(**inputs, **BUDGET)
    return tokens


@torch.no_grad()
def loss(model: Any, inputs: dict[str, Any] = INPUTS) -> Tensor:
    """Loss and logits of a prompt whose words are labels."""
    ids = inputs["input_ids"]
    output = model(**inputs, labels=ids.masked_fill(ids == 98, -100))
    return torch.cat((output.loss.flatten(), output.logits.flatten()))


@torch.no_grad()
def encode(model: Any, inputs: dict[str, Any] = INPUTS) -> Tensor:
    """Image features including the flags of their rows."""
    output = model.model.get_image_features(inputs["pixel_values"])
    rows, flags = torch.cat(list(output.pooler_output)), torch.cat(list(output.deepstack_features[-1]))
    return torch.cat((rows.flatten(), flags.flatten().to(rows)))


def at_once(*tasks: Callable[[], T]) -> list[T]:
    """Results of the tasks, each run in its own thread and started simultaneously."""
    gate = threading.Barrier(len(tasks))

    def begin(task: Callable[[], T]) -> T:
        gate.wait(20)
        return task()

    workers = [Worker() for _ in tasks]
    begun = [worker.start(functools.partial(begin, task)) for worker, task in zip(workers, tasks, strict=True)]
    found = [task.result(240) for task in begun]
    for worker in workers:
        worker.end()
    return found


def times(count: int, call: Callable[..., Tensor], model: Any, inputs: dict[str, Any]) -> Callable[[], list[Tensor]]:
    """A task that calls the model the given number of times."""
    return lambda: [call(model, inputs) for _ in range(count)]


def wrong(model: Any, which: dict[str, Any], threads: int, counts: dict[Callable[..., Tensor], int]) -> tuple[int, int]:
    """Run each call repeatedly in each thread; return the number of wrong results and the total."""
    prompts, found, total = PROMPTS[:threads], 0, 0
    with dropflow.attach(model, which):
        for call, count in counts.items():
            expected = [call(model, inputs) for inputs in prompts]
            results = at_once(*(times(count, call, model, inputs) for inputs in prompts))
            for own, right in zip(results, expected, strict=True):
                found += sum(not torch.equal(one, right) for one in own)
                total += len(own)
    return found, total


@pytest.mark.parametrize("threads", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", ENCODING)
def test_threads_that_encode_and_generate_never_mix(llava: Any, name: str, threads: int) -> None:
    assert wrong(llava, ENCODING[name], threads, {encode: 8, generate: 3}) == (0, 11 * threads)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["tome", "key-set", "visionzip"])
def test_none_of_a_thousand_calls_of_four_threads_is_wrong(llava: Any, name: str) -> None:
    assert wrong(llava, ENCODING[name], 4, {generate: 250}) == (0, 1000)


# Attaching and detaching while another thread calls the model

CLEAR = re.compile(
    "this cache was written under a policy; attach the policy again"
    "|encoded under a policy that has since been detached"
    "|this cache was written under another policy"
    "|features were not encoded under this attachment"
    "|encoded without the policy, so its `encode` stages would be skipped"
)
"""Refusals that a call may raise if another thread attaches or detaches between its parts."""


def outcomes(
    model: Any, which: dict[str, Any], call: Callable[[Any], Tensor], rounds: int, *, both: bool
) -> Counter[str]:
    """Call a model while another thread attaches, detaches and (with `both`) also calls it; count the outcomes."""
    plain = call(model)
    with dropflow.attach(model, which):
        governed = call(model)
    assert not torch.equal(plain, governed)
    found: Counter[str] = Counter()
    over = threading.Event()

    def classified() -> str:
        try:
            output = call(model)
        except DropflowError as refusal:
            return "refused" if CLEAR.search(str(refusal)) else f"{type(refusal).__name__}: {refusal}"
        except Exception as error:  # noqa: BLE001  # it is reported
            return f"{type(error).__name__}: {error}"
        return "plain" if torch.equal(output, plain) else "governed" if torch.equal(output, governed) else "wrong"

    def calling() -> None:
        while not over.is_set():
            found[classified()] += 1

    def attaching() -> None:
        try:
            for _ in range(rounds):
                with dropflow.attach(model, which):
                    if both:
                        found["own" if torch.equal(call(model), governed) else "own wrong"] += 1
                    else:
                        time.sleep(0.004)
                time.sleep(0.002)
        finally:
            over.set()

    at_once(calling, attaching)
    assert torch.equal(call(model), plain)
    return found


@pytest.mark.parametrize("both", [False, True], ids=["attaches", "attaches and calls"])
@pytest.mark.parametrize("call", [forward, generate, loss])
@pytest.mark.parametrize("which", [FASTV, TOME], ids=["fastv", "tome"])
def test_a_call_beside_attaching_is_plain_or_governed_or_refused(
    llava: Any, which: dict[str, Any], call: Callable[[Any], Tensor], both: bool
) -> None:
    found = outcomes(llava, which, call, 6, both=both)
    assert set(found) <= {"plain", "governed", "refused", "own"}, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("both", [False, True], ids=["attaches", "attaches and calls"])
@pytest.mark.parametrize("call", [forward, generate, loss])
@pytest.mark.parametrize("which", [FASTV, TOME, HIDROP], ids=["fastv", "tome", "hidrop"])
def test_two_hundred_rounds_of_attaching_divide_no_call(
    llava: Any, which: dict[str, Any], call: Callable[[Any], Tensor], both: bool
) -> None:
    found = outcomes(llava, which, call, 200, both=both)
    print(dict(found))
    assert set(found) <= {"plain", "governed", "refused", "own"}, found
    assert found["plain"] > 10


@torch.no_grad()
def test_features_are_those_of_no_policy_once_its_first_hook_is_gone(
    llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's plain call may find the model without hooks before detaching has ended."""
    remove, found = ModelHooks.remove, []

    def watched(hooks: ModelHooks) -> None:
        remove(hooks)
        found.append(in_force(serial))

    with dropflow.attach(llava, TOME):
        serial = llava.model.get_image_features(INPUTS["pixel_values"]).flags().plan
        assert in_force(serial)
        monkeypatch.setattr(ModelHooks, "remove", watched)
    assert found == [False]


class Pause:
    """A user hook that pauses the first call it sees, so that other threads can act in the meantime."""

    def __init__(self, module: Any) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self._handle = module.register_forward_pre_hook(self._hold)

    def _hold(self, *_: Any) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(60)

    def __enter__(self) -> Pause:
        return self

    def __exit__(self, *_: Any) -> None:
        self.go.set()
        self._handle.remove()


def parts(model: Any) -> dict[str, Any]:
    """Modules of a model in the order in which they run."""
    return {
        "model": model,
        "core": model.model,
        "vision layer": dict(model.named_modules())["model.vision_tower.encoder.layers.1"],
        "projector": model.model.multi_modal_projector,
        "decoder": model.model.language_model,
        "decoder layer": model.model.language_model.layers[1],
        "head": model.lm_head,
    }


PARTS = ("model", "core", "vision layer", "projector", "decoder", "decoder layer", "head")


@pytest.mark.parametrize("part", PARTS)
def test_detach_waits_for_the_forward_that_runs(llava: Any, part: str) -> None:
    plain, worker, other = forward(llava), Worker(), Worker()
    with Pause(parts(llava)[part]) as pause, dropflow.attach(llava, HIDROP) as flow:
        pause.reached.set()
        governed = forward(llava)
        pause.reached.clear()
        running = worker.start(lambda: forward(llava))
        assert pause.reached.wait(20)
        detaching = other.start(flow.detach)
        begun = part != "model"  # a user hook that runs before ours: the call has not begun yet
        assert detaching.wait(0.1) != begun
        assert flow.attached == begun
        pause.go.set()
        detaching.result(20)
        assert torch.equal(running.result(20), governed if begun else plain)
        assert torch.equal(forward(llava), plain)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("which", [HIDROP, TOME], ids=["hidrop", "tome"])
def test_a_forward_that_runs_when_a_policy_is_attached_stays_plain(
    llava: Any, part: str, which: dict[str, Any]
) -> None:
    plain, worker = loss(llava), Worker()
    with dropflow.attach(llava, which):
        governed = loss(llava)
    with Pause(parts(llava)[part]) as pause:
        running = worker.start(lambda: loss(llava))
        assert pause.reached.wait(20)
        with dropflow.attach(llava, which):
            assert torch.equal(loss(llava), governed)
            pause.go.set()
            assert torch.equal(running.result(20), plain)
            assert torch.equal(worker.run(lambda: loss(llava)), governed)


def test_a_plain_forward_passes_layers_that_a_policy_works_inside_of(llava: Any) -> None:
    """While a stage works inside a vision layer or ranks by a decoder layer, other threads run the layer unchanged."""
    plain, worker = forward(llava), Worker()
    running: list[Any] = []

    class Between(Stage[Any]):
        encode_at = (1.5,)

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            if running:
                pause.go.set()
                assert running.pop().wait(20)
            return Encode(keep=tuple(torch.arange(len(rows)) % 2 == 0 for rows in call.features))

    halves = policy(between={"use": Between})
    with Pause(parts(llava)["vision layer"]) as pause:
        pause.reached.set()
        with dropflow.attach(llava, halves):
            governed = forward(llava)
        pause.reached.clear()
        begun = worker.start(lambda: forward(llava))
        assert pause.reached.wait(20)
        with dropflow.attach(llava, halves):
            running.append(begun)
            assert torch.equal(forward(llava), governed)
        assert torch.equal(begun.result(20), plain)


@pytest.mark.parametrize("part", PARTS[1:])
def test_attaching_and_detaching_inside_of_a_forward_are_refused(llava: Any, part: str) -> None:
    flow = dropflow.attach(llava, HIDROP)
    expected = forward(llava)
    said: list[str] = []

    def act(*_: Any) -> None:
        for each in (flow.detach, lambda: dropflow.detach(llava), lambda: dropflow.attach(llava, RAGGED)):
            with pytest.raises(DropflowError, match="called inside a forward of this model") as error:
                each()
            said.append(str(error.value).partition(":")[0])

    handle = parts(llava)[part].register_forward_pre_hook(act)
    try:
        assert torch.equal(forward(llava), expected)
    finally:
        handle.remove()
        flow.detach()
    assert said == ["detach", "detach", "attach"]


@pytest.mark.parametrize("count", [2, 8])
def test_of_policies_attached_at_once_one_wins(llava: Any, count: int) -> None:
    plain = forward(llava)
    before, kept = fingerprint(llava), range(1, count + 1)
    named = [dropflow.load_policy({**one, "name": f"keeps-{keep}"}) for keep in kept for one in [one_boundary(keep)]]
    expected = []
    for one in named:
        with dropflow.attach(llava, one):
            expected.append(forward(llava))

    def attach(one: dropflow.Policy) -> Flow | str:
        try:
            return dropflow.attach(llava, one)
        except UnsupportedModel as refusal:
            return str(refusal)

    for _ in range(25):
        found = at_once(*(functools.partial(attach, one) for one in named))
        flows = [flow for flow in found if isinstance(flow, Flow)]
        assert len(flows) == 1, "one wins"
        number = found.index(flows[0])
        assert flows[0].attached
        assert dropflow.flow_of(llava) is flows[0]
        assert llava.config.dropflow["name"] == named[number].name
        text = f"attach: the policy {named[number].name!r} is already attached to this model; detach it first"
        assert [each for each in found if each is not flows[0]] == [text] * (count - 1)
        assert torch.equal(forward(llava), expected[number])
        flows[0].detach()
        assert fingerprint(llava) == before
        assert not hasattr(llava.config, "dropflow")
    assert torch.equal(forward(llava), plain)


def one_boundary(keep: int) -> dict[str, Any]:
    """A policy that keeps the given number of tokens from the second layer on."""
    return policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {1: keep}})


# Lost handles


@pytest.mark.parametrize("which", [HIDROP, TOME, policy()], ids=["hidrop", "tome", "no stages"])
def test_what_is_attached_can_be_taken_off_without_its_handle(llava: Any, which: dict[str, Any]) -> None:
    plain = forward(llava)
    before = fingerprint(llava)
    dropflow.attach(llava, which)
    gc.collect()
    expected = forward(llava)
    assert llava.config.dropflow["name"] == "test"
    dropflow.detach(llava)
    assert fingerprint(llava) == before
    assert not hasattr(llava.config, "dropflow")
    assert dropflow.flow_of(llava) is None
    assert torch.equal(forward(llava), plain)
    with dropflow.attach(llava, which) as flow:
        assert torch.equal(forward(llava), expected)
        assert dropflow.flow_of(llava) is flow


def test_detach_is_harmless_where_nothing_is_attached(llava: Any) -> None:
    model = tiny_llava(layers=2)
    before = fingerprint(model)
    dropflow.detach(model)
    assert dropflow.flow_of(model) is None
    assert fingerprint(model) == before
    with dropflow.attach(llava, HIDROP) as flow:
        dropflow.detach(model)
        assert flow.attached
        dropflow.detach(llava)
        dropflow.detach(llava)
        flow.detach()
        assert not flow.attached


def test_flow_of_gives_what_attaching_returned(llava: Any) -> None:
    assert dropflow.flow_of(llava) is None
    for attach in (dropflow.attach, functools.partial(dropflow.attach_set, default="one")):
        flow = attach(llava, HIDROP if attach is dropflow.attach else {"one": HIDROP})
        assert dropflow.flow_of(llava) is flow
        dropflow.detach(llava)
        assert dropflow.flow_of(llava) is None
        assert not flow.attached


# Models called inside stages


def stage_that_runs(run: Callable[[], Tensor], where: Any, found: list[Tensor]) -> type[Stage[Any]]:
    """A stage that runs a callable and then decides, either before a decoder layer (`prune`) or in the encoder."""

    class Encoding(Stage[Any]):
        encode_at = (where,)
        vision_taps = (1,) if where == 1.5 else ()

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            found.append(run())
            return Encode(keep=tuple(torch.arange(len(rows)) % 3 != 1 for rows in call.features))

    class Pruning(Stage[Any]):
        prune_at = (2,)

        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            found.append(run())
            return Keep(call.index % 3 != 1)

    return Pruning if where == "prune" else Encoding


PLACES = [None, 1, 1.5, "features", "prune"]


@pytest.mark.parametrize("call", [forward, generate])
@pytest.mark.parametrize("where", PLACES)
def test_a_stage_may_run_another_attached_model(llava: Any, where: Any, call: Callable[..., Tensor]) -> None:
    other, found = tiny_llava(layers=3, seed=5), list[Tensor]()
    after = {"keys": {"use": "mustdrop/key-set", "share": 0.2, "layer": 1}} if where == 1.5 else {}
    with dropflow.attach(other, policy(**TOME["stages"], **FASTV["stages"])):
        before = call(other, PROMPTS[1])
        stage = stage_that_runs(lambda: before, where, [])
        with dropflow.attach(llava, policy(runs={"use": stage}, **after, **RAGGED["stages"])):
            expected = call(llava)
        stage = stage_that_runs(lambda: call(other, PROMPTS[1]), where, found)
        with dropflow.attach(llava, policy(runs={"use": stage}, **after, **RAGGED["stages"])):
            assert torch.equal(call(llava), expected)
            assert torch.equal(call(llava), expected)
    assert len(found) == 2
    assert all(torch.equal(one, before) for one in found)


@torch.no_grad()
@pytest.mark.parametrize("where", PLACES)
def test_a_stage_may_run_another_attached_model_in_a_later_turn(llava: Any, where: Any) -> None:
    other = tiny_llava(layers=3, seed=5)
    first, second = PROMPTS[0], PROMPTS[2]
    mask = torch.cat((first["attention_mask"], second["attention_mask"]), 1)

    def turns(run: Callable[[], Tensor]) -> Tensor:
        cache = DynamicCache()
        which = policy(runs={"use": stage_that_runs(run, where, [])}, **RAGGED["stages"])
        with dropflow.attach(llava, which):
            llava(**first, **{CACHE_ARGUMENT: cache})
            later: Tensor = llava(**(second | {"attention_mask": mask}), **{CACHE_ARGUMENT: cache}).logits
        return later

    with dropflow.attach(other, policy(**TOME["stages"], **FASTV["stages"])):
        before = forward(other)
        assert torch.equal(turns(lambda: forward(other)), turns(lambda: before))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("part", ["model", "core", "decoder", "features", "tower"])
def test_a_stage_that_runs_its_own_model_is_refused_by_name(llava: Any, where: Any, part: str) -> None:
    core = llava.model
    runs: dict[str, Callable[[], Any]] = {
        "model": lambda: forward(llava),
        "core": lambda: core(**INPUTS),
        "decoder": lambda: core.language_model(inputs_embeds=torch.zeros(1, 4, 32)),
        "features": lambda: core.get_image_features(INPUTS["pixel_values"]),
        "tower": lambda: core.vision_tower(INPUTS["pixel_values"]),
    }
    if part == "tower" and where in (None, "features", "prune"):
        pytest.skip("the encoder has run by then, and holds nothing of the call")
    plain = forward(llava)
    with dropflow.attach(llava, policy(runs={"use": stage_that_runs(runs[part], where, [])})):
        for _ in range(2):
            with pytest.raises(UnsupportedCall, match="called inside its own forward, for example by a stage's hook"):
                forward(llava)
    assert torch.equal(forward(llava), plain)


def test_a_model_that_shares_parts_with_an_attached_one_is_refused() -> None:
    models = [tiny_llava(layers=2, seed=seed) for seed in (0, 1)]
    models[1].model.vision_tower = models[0].model.vision_tower
    plain = [forward(model) for model in models]
    before = [fingerprint(model) for model in models]
    with dropflow.attach(models[0], TOME) as flow:
        governed = forward(models[0])
        with pytest.raises(UnsupportedModel, match="shares its vision encoder with a model that has a policy attached"):
            dropflow.attach(models[1], TOME)
        assert torch.equal(forward(models[0]), governed)
        assert torch.equal(forward(models[1]), plain[1])
        flow.detach()
        with dropflow.attach(models[1], TOME):
            assert not torch.equal(forward(models[1]), plain[1])
    assert [fingerprint(model) for model in models] == before
    assert all(torch.equal(forward(model), right) for model, right in zip(models, plain, strict=True))


# Sets of policies, of which each call chooses one

SET: dict[str, Any] = {"dense": None, "hidrop": {**HIDROP, "name": "inner"}, "fastv": FASTV, "tome": TOME}


@pytest.fixture
def flows(llava: Any) -> Iterator[FlowSet]:
    """A set whose default is `hidrop`."""
    with dropflow.attach_set(llava, SET, default="hidrop") as attached:
        yield attached


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[Callable[..., Tensor], Tensor]]:
    """The output of each policy of the set when attached alone."""
    model, found = tiny_llava(), {}
    for name, which in SET.items():
        if which is not None:
            dropflow.attach(model, which)
        found[name] = {call: call(model) for call in (forward, generate, loss)}
        dropflow.detach(model)
    assert len({tuple(own[forward].flatten().tolist()) for own in found.values()}) == len(SET)
    return found


@pytest.mark.parametrize("call", [forward, generate, loss])
def test_each_call_chooses_a_policy_of_the_set(
    llava: Any, flows: FlowSet, alone: dict[str, Any], call: Callable[..., Tensor]
) -> None:
    assert torch.equal(call(llava), alone["hidrop"][call])
    for name in SET:
        with flows.using(name) as flow:
            assert flow is flows[name]
            assert torch.equal(call(llava), alone[name][call])
            with flows.using("dense"):
                assert torch.equal(call(llava), alone["dense"][call])
                with flows.using("tome"):
                    assert torch.equal(call(llava), alone["tome"][call])
            assert torch.equal(call(llava), alone[name][call])
            with pytest.raises(ZeroDivisionError), flows.using("fastv"):
                raise ZeroDivisionError
            assert torch.equal(call(llava), alone[name][call])
    assert torch.equal(call(llava), alone["hidrop"][call])


def test_threads_choose_for_themselves(llava: Any, flows: FlowSet, alone: dict[str, Any]) -> None:
    def work(name: str | None) -> list[Tensor]:
        if name is None:
            return [call(llava) for _ in range(5) for call in (forward, generate)]
        with flows.using(name):
            return [call(llava) for _ in range(5) for call in (forward, generate)]

    names = [None, *SET]
    with flows.using("tome"):  # applies only to this thread
        results = at_once(*(functools.partial(work, name) for name in names))
        assert torch.equal(forward(llava), alone["tome"][forward])
    for name, own in zip(names, results, strict=True):
        expected = alone[name or "hidrop"]
        assert all(torch.equal(one, expected[call]) for one, call in zip(own, (forward, generate) * 5, strict=True))


def test_a_set_is_attached_and_detached_as_one(llava: Any, flows: FlowSet) -> None:
    assert dropflow.flow_of(llava) is flows
    assert list(flows) == list(SET)
    assert flows["dense"] is None
    assert len(flows) == 4
    for name in ("hidrop", "fastv", "tome"):
        assert flows[name].attached  # type: ignore[union-attr]
    assert llava.config.dropflow["name"] == "inner"
    for attach in (dropflow.attach, functools.partial(dropflow.attach_set, default="x")):
        with pytest.raises(UnsupportedModel, match="'inner', 'test', 'test' is already attached to this model"):
            attach(llava, RAGGED if attach is dropflow.attach else {"x": RAGGED})
    flow = flows["fastv"]
    assert flow is not None
    flow.detach()
    assert not flows.attached
    assert dropflow.flow_of(llava) is None
    assert not hasattr(llava.config, "dropflow")
    with pytest.raises(UnsupportedCall, match="this set was detached"), flows:
        pass
    dropflow.attach(llava, RAGGED).detach()


def test_names_that_are_not_in_the_set_are_refused(llava: Any, flows: FlowSet) -> None:
    wrong_name = flows.using("fastvv")
    with (
        pytest.raises(UnsupportedCall, match="using: no policy 'fastvv' in this set; did you mean 'fastv'"),
        wrong_name,
    ):
        pass
    with pytest.raises(KeyError):
        flows["fastvv"]
    flows.detach()
    with pytest.raises(PolicyError, match="attach_set: the default 'hidrop' is not among"):
        dropflow.attach_set(llava, {"dense": None}, default="hidrop")
    with pytest.raises(PolicyError, match=r"attach_set: expected a mapping of names to policies, got \{\}"):
        dropflow.attach_set(llava, {}, default="hidrop")
    assert dropflow.flow_of(llava) is None


def test_a_set_with_a_dense_default_records_nothing(llava: Any, alone: dict[str, Any]) -> None:
    with dropflow.attach_set(llava, SET, default="dense") as flows:
        assert not hasattr(llava.config, "dropflow")
        assert torch.equal(generate(llava), alone["dense"][generate])
        with flows.using("fastv"):
            assert torch.equal(generate(llava), alone["fastv"][generate])
        for flow in flows.values():
            if flow is not None:
                with pytest.raises(UnsupportedCall, match="record: a model's config holds one policy"):
                    flow.record()
    assert not hasattr(llava.config, "dropflow")


def test_only_the_default_is_recorded(llava: Any) -> None:
    with dropflow.attach_set(llava, SET, default="hidrop") as flows:
        assert flows["fastv"] is not None
        assert flows["hidrop"] is not None
        with pytest.raises(UnsupportedCall, match="record: a model's config holds one policy, the default"):
            flows["fastv"].record()
        flows["hidrop"].record()
    assert llava.config.dropflow["name"] == "inner"
    with dropflow.attach(llava) as flow:
        assert flow.policy.name == "inner"
    del llava.config.dropflow


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), [("hidrop", "fastv"), ("fastv", "hidrop"), ("fastv", "dense")])
def test_a_cache_goes_on_under_the_policy_it_was_begun_under(
    llava: Any, flows: FlowSet, first: str, second: str
) -> None:
    def begun() -> dict[str, Any]:
        with flows.using(first):
            cache = llava(**INPUTS, use_cache=True)[CACHE_ARGUMENT]
        return {"input_ids": torch.tensor([[7]]), CACHE_ARGUMENT: cache}

    with flows.using(first):
        expected = llava(**begun()).logits
    with flows.using(second), pytest.raises(UnsupportedCall, match="this cache was written under a"):
        llava(**begun())
    with flows.using(first):
        assert torch.equal(llava(**begun()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("second", ["dense", "fastv"])
def test_features_go_on_under_the_policy_they_were_encoded_under(llava: Any, flows: FlowSet, second: str) -> None:
    text = {name: value for name, value in INPUTS.items() if name != "pixel_values"}
    with flows.using("tome"):
        encoded = {"image": llava.model.get_image_features(INPUTS["pixel_values"])}
        assert torch.isfinite(llava(**text, mm_encoder_outputs=encoded).logits).all()
    with flows.using(second), pytest.raises(UnsupportedCall, match="mm_encoder_outputs: the image features were"):
        llava(**text, mm_encoder_outputs=encoded)


def test_a_generator_that_is_given_up_chooses_no_more(llava: Any, flows: FlowSet, alone: dict[str, Any]) -> None:
    def stream() -> Iterator[Tensor]:
        with flows.using("fastv"):
            while True:
                yield forward(llava)

    worker, streams = Worker(), [stream()]
    assert torch.equal(worker.run(lambda: next(streams[0])), alone["fastv"][forward])
    streams.clear()  # ends the block in another thread than the one that began it
    gc.collect()
    assert torch.equal(worker.run(lambda: forward(llava)), alone["hidrop"][forward])
    assert torch.equal(forward(llava), alone["hidrop"][forward])


# Threads that end and processes that start in the middle of a forward


@pytest.mark.parametrize("error", [*ERRORS, RuntimeError])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("lives", [True, False], ids=["lives on", "dies"])
def test_a_thread_that_is_ended_holds_up_nobody(llava: Any, part: str, error: type[BaseException], lives: bool) -> None:
    def stop(*_: Any) -> None:
        raise error("stop")

    plain = forward(llava)
    with dropflow.attach(llava, HIDROP):
        expected, worker = forward(llava), Worker()
        handle = parts(llava)[part].register_forward_pre_hook(stop)
        with pytest.raises(error, match="stop"):
            worker.run(lambda: forward(llava))
        handle.remove()
        if not lives:
            worker.end()
        assert all(torch.equal(found, expected) for found in at_once(*[lambda: forward(llava)] * 2))
        if lives:
            assert torch.equal(worker.run(lambda: forward(llava)), expected)
            worker.end()
    assert torch.equal(forward(llava), plain)


forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
warned = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


def right_after_a_fork(model: Any, expected: Tensor, plain: Tensor, functions: dict[str, Any]) -> bool:
    """Whether the outputs of the attached and of the detached model are correct."""
    right = torch.equal(forward(model), expected)
    dropflow.detach(model)
    return right and torch.equal(forward(model), plain) and dict(ALL_ATTENTION_FUNCTIONS) == functions


@forking
@warned
@pytest.mark.parametrize("part", PARTS)
def test_a_fork_while_another_thread_runs_the_model(llava: Any, part: str) -> None:
    plain, functions, worker = forward(llava), dict(ALL_ATTENTION_FUNCTIONS), Worker()
    with Pause(parts(llava)[part]) as pause, dropflow.attach(llava, FASTV):
        pause.reached.set()
        expected = forward(llava)
        pause.reached.clear()
        running = worker.start(lambda: forward(llava))
        assert pause.reached.wait(20)
        assert in_child(lambda: right_after_a_fork(llava, expected, plain, functions)) == 0
        pause.go.set()
        assert torch.equal(running.result(20), expected)


@forking
@warned
@pytest.mark.parametrize("part", PARTS[1:])
def test_a_fork_inside_of_a_forward_goes_on_in_both_processes(llava: Any, part: str) -> None:
    plain, functions, pids = forward(llava), dict(ALL_ATTENTION_FUNCTIONS), list[int]()
    with dropflow.attach(llava, FASTV):
        expected = forward(llava)
        handle = parts(llava)[part].register_forward_pre_hook(lambda *_: pids.append(os.fork()) if not pids else None)
        found = None
        try:
            found = forward(llava)
        finally:
            handle.remove()
            if pids and not pids[0]:
                here = found is not None and torch.equal(found, expected)
                leave(lambda: here and right_after_a_fork(llava, expected, plain, functions))
        assert torch.equal(found, expected)
        assert exit_code(pids[0]) == 0

"""Encoding beside the text layers gives the bits of encoding before them, and nothing of it outlives its call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from interrupts import in_child
from tiny import CHUNKS_IMAGES, policy, prompt, tiny_llava
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import dropflow
from dropflow import Encode, EncodeCall, Stage, WindowCall, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import PolicyError, UnsupportedCall, UnsupportedModel
from dropflow.lifecycle.events import BoundaryEvent, EncodeEvent
from dropflow.testing import tiny_models
from dropflow.testing.case import BUDGET, Case
from dropflow.testing.families.tiny import SAMPLES
from dropflow.testing.guarantees import fingerprint
from dropflow.testing.kit import VIDEO_SAMPLES
from dropflow.testing.probes import EveryThird, Inside, LeaveOut, use

ENTER = {"use": "hidrop/late-injection", "at": 3}
PYRAMID = {"use": "hidrop/concave-pyramid", "keep": {4: 3}}
LATE = policy(enter=ENTER, pyramid=PYRAMID)
POLICIES = {
    "late": LATE,
    "at 1": policy(enter={**ENTER, "at": 1}, leave={"use": "hidrop/early-exit", "at": 4}),
    "rows dropped": policy(enter=ENTER, third=use(EveryThird), pyramid={**PYRAMID, "keep": {4: 0.5}}),
}
INSIDE = policy(enter=ENTER, inside=use(Inside), pyramid=PYRAMID)
UNITS = policy(enter=ENTER, units=use(LeaveOut), pyramid={**PYRAMID, "keep": {4: 0.5}})
MERGED = policy(enter=ENTER, merge={"use": "tome/token-merging", "r": 2, "layers": 2}, pyramid=PYRAMID)
BESIDE = "images encoded beside the text layers before boundary "
BEFORE = "images encoded before the text layers: "
FAMILIES = tiny_models()
THREAD = "dropflow-side-work"


def both(model: Any, which: Any, run: Callable[[Any], Any], adapter: Any = None) -> list[Any]:
    """What `run` returns for the flow, without and with `overlap`."""
    found = []
    for overlap in (False, True):
        with dropflow.attach(model, which, adapter=adapter, overlap=overlap) as flow:
            found.append(run(flow))
    return found


def same(one: Any, other: Any) -> bool:
    """Whether nested lists hold equal tensors, bit for bit, and equal values."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@contextmanager
def encoder_threads(module: Any) -> Iterator[list[str]]:
    """Collects the names of the threads in which a module runs."""
    names: list[str] = []
    handle = module.register_forward_pre_hook(lambda *_: names.append(threading.current_thread().name))
    try:
        yield names
    finally:
        handle.remove()


def nothing_runs() -> bool:
    return not any(thread.name == THREAD for thread in threading.enumerate())


def held(cache: Any) -> list[Tensor]:
    """Keys and values of all layers, without padding, in which no attention reads anything."""
    found = []
    for layer in cache.layers:
        index = layer.index
        real = torch.ones_like(index.logical, dtype=torch.bool) if index.valid is None else index.valid
        found += [tensor.transpose(1, 2)[real] for tensor in (layer.keys, layer.values)]
    return found


@pytest.mark.parametrize("which", POLICIES)
@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("llava", SAMPLES),
        ("qwen2_5_vl", SAMPLES),
        ("qwen2_5_vl", VIDEO_SAMPLES),
        ("qwen3_vl", SAMPLES),
        ("qwen3_vl", VIDEO_SAMPLES),
        ("internvl", SAMPLES),
    ],
)
@torch.no_grad()
def test_bits_are_those_of_the_serial_run(name: str, samples: Any, which: str) -> None:
    family, tiny = FAMILIES[name]
    case = Case(name, family, tiny, POLICIES[which], samples=samples)
    left = case.padded_left()

    def run(flow: Any) -> Any:
        cache = DynamicCache()
        whole = case.model(**case.inputs, **{CACHE_ARGUMENT: cache})
        told, report = flow.report().overlap, flow.report()
        found = [value for key, value in whole.items() if key.endswith("hidden_states")]
        plain = [flow.live(), report.flops, report.kv_bytes, report.entry_visual_tokens, held(cache)]
        loss = case.model(**case.inputs, labels=case.inputs["input_ids"]).loss
        tokens = case.model.generate(**left.inputs, **BUDGET)
        return [whole.logits, loss, tokens, flow.live(), *found, *plain], [told, flow.report().overlap]

    (serial, none), (beside, told) = both(case.model, case.policy, run, family)
    assert same(serial, beside)
    assert none == [None, None]
    assert told == [BESIDE + str(1 if which == "at 1" else 3)] * 2
    assert nothing_runs()


@pytest.mark.parametrize(("name", "which"), [("llava", INSIDE), ("llava", MERGED), ("qwen3_vl", UNITS)])
@torch.no_grad()
def test_stages_work_inside_the_encoder_of_the_other_thread(name: str, which: Any) -> None:
    family, tiny = FAMILIES[name]
    case = Case(name, family, tiny, which)
    runs = both(case.model, which, lambda flow: [case.model(**case.inputs).logits, flow.live()], family)
    assert same(*runs)


@torch.no_grad()
def test_the_encoder_and_the_first_layers_run_at_the_same_time() -> None:
    model, inputs = tiny_llava(), prompt()
    layer, tower = threading.Event(), threading.Event()
    met: list[bool] = []

    def first_layer(*_: Any) -> None:
        layer.set()
        met.append(tower.wait(20))

    def encoder(*_: Any) -> None:
        tower.set()
        met.append(layer.wait(20))

    handles = [
        model.model.vision_tower.register_forward_pre_hook(encoder),
        model.model.language_model.layers[0].register_forward_pre_hook(first_layer),
    ]
    with dropflow.attach(model, LATE, overlap=True), encoder_threads(model.model.vision_tower) as names:
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert met == [True, True]
    assert names == [THREAD]


@pytest.mark.skipif(not CHUNKS_IMAGES, reason="this transformers encodes inside every forward of `generate`")
@torch.no_grad()
def test_generate_defers_its_encoding_to_the_prefill() -> None:
    model, inputs = tiny_llava(), prompt()

    def run(flow: Any) -> Any:  # noqa: ARG001
        found, names = [], []
        ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 7}]
        for more in [*ways, {"num_return_sequences": 2}]:
            sampled = {"do_sample": "num_return_sequences" in more}
            torch.manual_seed(0)
            with encoder_threads(model.model.vision_tower) as own:
                found.append(model.generate(**inputs, **{**BUDGET, **sampled}, **more))
            names.append(own)
        return found, names

    (serial, _), (beside, names) = both(model, LATE, run)
    assert same(serial, beside)
    # beams, samples and chunks read the features before the prefill
    assert names == [[THREAD], [THREAD], ["MainThread"], ["MainThread"], ["MainThread"]]


@torch.no_grad()
def test_features_that_a_caller_encodes_are_features_at_once() -> None:
    model, inputs = tiny_llava(), prompt()
    pixels = inputs.pop("pixel_values")

    def run(flow: Any) -> Any:  # noqa: ARG001
        features = model.model.get_image_features(pixels)
        return list(features.pooler_output), model(**inputs, mm_encoder_outputs={"image": features}).logits

    assert same(*both(model, POLICIES["rows dropped"], run))


@torch.no_grad()
def test_a_later_turn_and_another_image_continue_the_cache() -> None:
    model = tiny_llava()
    first, second = prompt(((3, "I", 5),)), prompt(((2, "I", "I", 4),), seed=5)

    def run(flow: Any) -> Any:
        cache, found = DynamicCache(), []
        for turn in (first, second):
            seen = torch.ones(1, cache.get_seq_length(), dtype=torch.long)
            mask = torch.cat((seen, turn["attention_mask"]), 1)
            found.append(model(**{**turn, "attention_mask": mask}, **{CACHE_ARGUMENT: cache}).logits)
            found.append(flow.live())
        layers = [layer.index for layer in cache.layers]
        return found, held(cache), [(index.images, index.image_id, index.logical) for index in layers]

    assert same(*both(model, LATE, run))


@pytest.mark.parametrize("mode", ["gradients", "inference", "autocast"])
def test_the_other_thread_has_the_modes_of_torch(mode: str) -> None:
    model, inputs = tiny_llava(), prompt()

    def run(flow: Any) -> Any:
        if mode == "gradients":  # in eval mode, as for saliency
            model.zero_grad()
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            told = flow.report().overlap
            return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)], told
        with torch.inference_mode() if mode == "inference" else torch.autocast("cpu"), torch.no_grad():
            logits = model(**inputs).logits
            return [logits, logits.is_inference(), logits.dtype], flow.report().overlap

    (serial, _), (beside, told) = both(model, LATE, run)
    assert told == BESIDE + "3"
    assert len(serial) > (20 if mode == "gradients" else 1)
    assert same(serial, beside)


@torch.no_grad()
def test_an_error_of_the_encoder_is_raised_by_the_call() -> None:
    model, inputs = tiny_llava(), prompt()
    plain, before = model(**inputs).logits, fingerprint(model)
    stop = RuntimeError("no such picture")
    with dropflow.attach(model, LATE, overlap=True):
        expected = model(**inputs).logits
        for call in (model, lambda **given: model.generate(**given, **BUDGET)):
            handle = model.model.vision_tower.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(stop))
            with pytest.raises(RuntimeError, match="no such picture") as raised:
                call(**inputs)
            handle.remove()
            assert raised.value is stop
            assert nothing_runs()
            assert torch.equal(model(**inputs).logits, expected)
    assert fingerprint(model) == before
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["layers.0", "layers.2", "layers.3"])
@torch.no_grad()
def test_a_forward_that_is_aborted_waits_for_the_thread(where: str, error: type[BaseException]) -> None:
    model, inputs = tiny_llava(), prompt()
    go, begun = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        begun.set()
        go.wait(20)

    def stop(*_: Any) -> None:
        assert where == "layers.3" or begun.wait(20)
        threading.Timer(0.05, go.set).start()
        raise error("stop")

    with dropflow.attach(model, MERGED, overlap=True) as flow:
        expected = model(**inputs).logits
        module = dict(model.model.language_model.named_modules())[where]
        handles = [model.model.vision_tower.register_forward_pre_hook(slow), module.register_forward_pre_hook(stop)]
        if where == "layers.3":
            go.set()
        with pytest.raises(error):
            model(**prompt(side="right"))
        if error is RuntimeError:
            assert nothing_runs()
        for handle in handles:
            handle.remove()
        assert torch.equal(model(**inputs).logits, expected)
        assert flow.report().overlap == BESIDE + "3"
    assert nothing_runs()


def test_detaching_waits_for_the_thread_of_an_interrupted_call() -> None:
    model, inputs = tiny_llava(), prompt()
    with torch.no_grad():
        plain = model(**inputs).logits
    before, go, begun = fingerprint(model), threading.Event(), threading.Event()
    flow = dropflow.attach(model, MERGED, overlap=True)

    def slow(*_: Any) -> None:
        begun.set()
        go.wait(20)

    def stop(*_: Any) -> None:
        begun.wait(20)
        raise KeyboardInterrupt

    handles = [
        model.model.vision_tower.register_forward_pre_hook(slow),
        model.model.language_model.layers[1].register_forward_pre_hook(stop),
    ]
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(**inputs)
    assert not nothing_runs()
    threading.Timer(0.05, go.set).start()
    flow.detach()
    assert nothing_runs()
    for handle in handles:
        handle.remove()
    assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_fork_while_the_thread_encodes_leaves_a_model_that_works() -> None:
    model, inputs = tiny_llava(), prompt()
    go, begun, codes = threading.Event(), threading.Event(), []

    @torch.no_grad()
    def right() -> bool:
        handles[0].remove()
        handles[1].remove()
        return torch.equal(model(**inputs).logits, expected)

    def slow(*_: Any) -> None:
        begun.set()
        go.wait(30)

    def fork(*_: Any) -> None:
        begun.wait(20)
        codes.append(in_child(lambda: other(right)))
        go.set()

    def other(check: Callable[[], bool]) -> bool:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(check()))
        thread.start()
        thread.join(20)
        return found == [True]

    with dropflow.attach(model, LATE, overlap=True), torch.no_grad():
        expected = model(**inputs).logits
        handles = [
            model.model.vision_tower.register_forward_pre_hook(slow),
            model.model.language_model.layers[1].register_forward_pre_hook(fork),
        ]
        thread = threading.Thread(target=lambda: forward(model, inputs))
        thread.start()
        thread.join(30)
        right()
    assert codes == [0]


def forward(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


@torch.no_grad()
def test_threads_take_turns_with_what_runs_beside_them() -> None:
    model = tiny_llava()
    prompts = [prompt(((3, "I", 5),)), prompt((("I", 2, "I", 9), (4, "I", 3)), seed=7)]
    results: dict[int, list[Tensor]] = {0: [], 1: []}
    with dropflow.attach(model, MERGED, overlap=True):
        expected = [model.generate(**inputs, **BUDGET) for inputs in prompts]

        def work(number: int) -> None:
            results[number] += [model.generate(**prompts[number], **BUDGET) for _ in range(6)]

        threads = [threading.Thread(target=work, args=(number,)) for number in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert all(len(found) == 6 for found in results.values())
    assert all(torch.equal(one, expected[number]) for number, found in results.items() for one in found)


@torch.no_grad()
def test_a_prefix_is_kept_and_asked_as_without_overlap() -> None:
    model, inputs = tiny_llava(), prompt(((3, "I", 5),))

    def run(flow: Any) -> Any:
        prefix = flow.prefix(**inputs)
        return [prefix.nbytes, model.generate(**prefix.inputs(**inputs), **BUDGET), flow.live()], flow.report().overlap

    (serial, _), (beside, told) = both(model, LATE, run)
    assert same(serial, beside)
    assert told is None  # a call that begins with a prefix encodes nothing
    assert nothing_runs()


@torch.no_grad()
def test_a_later_question_recalls_the_same() -> None:
    model, first = tiny_llava(), prompt(((3, "I", 5),))

    def run(flow: Any) -> Any:  # noqa: ARG001
        cache = DynamicCache()
        shown = model(**first, **{CACHE_ARGUMENT: cache}).logits
        mask = torch.ones(1, cache.get_seq_length() + 3, dtype=torch.long)
        asked = model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits
        return shown, asked, held(cache)

    assert same(*both(model, {**LATE, "recall": True}, run))


class CountsVision(Stage[Any]):
    """Enters where the number of visual tokens says."""

    @hookimpl
    def inject(self, call: WindowCall) -> int:
        return 2 + int(call.visual_tokens.max()) % 2


class Meddles(Stage[Any]):
    """Does in `encode` what no stage may."""

    act: Callable[[], Any] = staticmethod(lambda: None)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode | None:  # noqa: ARG002
        type(self).act()
        return None


class Told(Stage[Any]):
    """Records what observers are told."""

    events: list[Any]

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.events = []

    @hookimpl
    def observe(self, event: BoundaryEvent) -> None:
        own = event.prompt
        self.events.append((event.boundary, event.stages, event.live, event.image_id, own.present, event.index))

    @hookimpl
    def observe_encode(self, event: EncodeEvent) -> None:
        self.events.append((event.modality, [step.stage for step in event.steps]))


@torch.no_grad()
def test_a_stage_may_ask_how_many_visual_tokens_there_are() -> None:
    model, inputs = tiny_llava(), prompt()
    which = policy(enter=use(CountsVision), third=use(EveryThird))
    runs = both(model, which, lambda flow: ([model(**inputs).logits, flow.live()], flow.report().overlap))
    assert same(runs[0][0], runs[1][0])
    assert runs[1][1] == BEFORE + "a stage asked for the number of visual tokens"


@torch.no_grad()
def test_observers_are_told_the_same_in_the_same_order() -> None:
    model, inputs = tiny_llava(), prompt()
    which = policy(enter=ENTER, third=use(EveryThird), pyramid={**PYRAMID, "keep": {4: 0.5}}, told=use(Told))

    def run(flow: Any) -> Any:
        model(**inputs)
        return dict(flow.plan.stages)["told"].events

    serial, beside = both(model, which, run)
    assert [event[0] for event in serial] == ["image", 0, 3, 4]
    assert same(serial, beside)


@pytest.mark.parametrize("what", ["model", "features", "detach", "attach"])
@torch.no_grad()
def test_a_stage_that_meddles_in_the_other_thread_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_llava(), prompt()
    with dropflow.attach(model, policy(enter=ENTER, meddle=use(Meddles)), overlap=True) as flow:
        expected = model(**inputs).logits
        act: dict[str, Callable[[], Any]] = {
            "model": lambda: model(**inputs),
            "features": lambda: model.model.get_image_features(inputs["pixel_values"]),
            "detach": flow.detach,
            "attach": lambda: dropflow.attach(model, LATE),
        }
        with monkeypatch.context() as meddling:
            meddling.setattr(Meddles, "act", staticmethod(act[what]))
            with pytest.raises(UnsupportedCall, match="inside"):
                model(**inputs)
        assert nothing_runs()
        assert torch.equal(model(**inputs).logits, expected)


def test_what_cannot_overlap_runs_one_after_the_other_and_says_so() -> None:
    model, inputs = tiny_llava(), prompt()

    def told(run: Callable[[Any], Any]) -> str:
        def each(flow: Any) -> Any:
            found = run(flow)
            return found, flow.report().overlap

        (serial, _), (beside, reason) = both(model, LATE, each)
        assert same(serial, beside)
        return str(reason)

    def training(_: Any) -> Any:
        model.train()
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        model.eval()
        return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]

    def counting(_: Any) -> Any:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            model(**inputs)
        return flops.get_total_flops()

    def replaying(flow: Any) -> Any:
        forward(model, inputs)
        with flow.replay(flow.keeps()):
            return forward(model, inputs)

    def instructed(_: Any) -> Any:
        asks = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        asks[:, -2:] = True
        with dropflow.instruction_tokens(asks):
            return forward(model, inputs)

    @torch.no_grad()
    def tuples(_: Any) -> Any:
        states = model.model(**inputs, return_dict=False)
        return [states[0], states[-1]]

    assert told(training) == BEFORE + "the model trains"
    assert told(counting) == BEFORE + "a mode of torch is active in this thread, such as a counter of FLOPs"
    assert told(replaying) == BEFORE + "keeps are replayed, or a prefix is kept"
    assert told(instructed) == BEFORE + "instruction tokens are stated"
    assert told(tuples) == BEFORE + "a tuple was asked for"
    assert "images encoded before the text layers: the model trains" in report_of_training(model, inputs)


def report_of_training(model: Any, inputs: dict[str, Any]) -> str:
    with dropflow.attach(model, LATE, overlap=True) as flow:
        model.train()(**inputs)
        model.eval()
        return str(flow.report())


def test_what_can_never_overlap_is_refused_when_attaching() -> None:
    llava = tiny_llava()
    with pytest.raises(PolicyError, match=r"overlap: under 'test' .* no layer runs on text alone; add a stage"):
        dropflow.attach(llava, policy(pyramid=PYRAMID), overlap=True)
    with pytest.raises(PolicyError, match="no layer runs on text alone"):
        dropflow.attach(llava, policy(enter={**ENTER, "at": 0}), overlap=True)
    assert dropflow.flow_of(llava) is None
    family, tiny = FAMILIES["molmo2"]  # adds features to the embeddings of their placeholders
    with pytest.raises(UnsupportedModel, match=r"overlap: the adapter Molmo2 does not say .* leave `overlap` out"):
        dropflow.attach(tiny.model(), policy(enter=ENTER), adapter=family, overlap=True)


@torch.no_grad()
def test_each_policy_of_a_set_encodes_as_it_can() -> None:
    model, inputs = tiny_llava(), prompt()
    early = policy(pyramid=PYRAMID)
    given = {"late": LATE, "early": early, "dense": None}

    def run(flows: Any, name: str) -> tuple[list[Any], Any]:
        with flows.using(name) as flow, encoder_threads(model.model.vision_tower) as names:
            logits, tokens = model(**inputs).logits, model.generate(**inputs, **BUDGET)
        return [logits, tokens, names], None if flow is None else flow.report().overlap

    with dropflow.attach_set(model, given, default="early") as flows:
        serial = {name: run(flows, name) for name in given}
    with dropflow.attach_set(model, given, default="early", overlap=True) as flows:
        for name in (*given, *reversed(given)):  # before and after each of the others
            (*expected, _), _ = serial[name]
            (*found, names), told = run(flows, name)
            assert same(expected, found), name
            assert (names == [THREAD] * 2) == (name == "late")
            reason = {"late": BESIDE + "3", "early": BEFORE + "vision takes part from the first layer on"}.get(name)
            assert told == reason
    assert nothing_runs()


def test_a_set_in_which_no_policy_can_overlap_is_refused() -> None:
    llava = tiny_llava()
    given = {"one": policy(pyramid=PYRAMID), "other": policy(enter={**ENTER, "at": 0}), "dense": None}
    with pytest.raises(PolicyError, match=r"overlap: under 'test', 'test' vision takes part from the first layer on"):
        dropflow.attach_set(llava, given, default="one", overlap=True)
    with pytest.raises(PolicyError, match="overlap: under no policy vision takes part from the first layer on"):
        dropflow.attach_set(llava, {"dense": None}, default="dense", overlap=True)
    assert dropflow.flow_of(llava) is None


@torch.no_grad()
def test_features_that_do_not_fit_the_prompt_are_refused() -> None:
    model, inputs = tiny_llava(), prompt(((3, "I", 5),))
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with (
        dropflow.attach(model, LATE, overlap=True),
        pytest.raises(UnsupportedModel, match=r"the prompt has 16 image placeholders .* 32 rows"),
    ):
        model(**inputs)


@torch.no_grad()
def test_a_decoder_that_changes_its_embeddings_is_refused() -> None:
    from transformers import GraniteConfig, LlavaConfig, LlavaForConditionalGeneration

    from dropflow.testing.families.tiny import IMAGE, TEXT, VISION, Tiny, square_pictures

    def granite() -> Any:
        text = GraniteConfig(**TEXT, embedding_multiplier=12.0)
        vision = {**VISION, "image_size": 24, "patch_size": 6, "model_type": "clip_vision_model"}
        return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE))

    tiny = Tiny(granite, {"image": square_pictures(24, 16)})
    model, inputs = tiny.model(), tiny.prompt()[0]
    with (
        dropflow.attach(model, LATE, overlap=True),
        pytest.raises(UnsupportedCall, match="overlap: the text decoder changes its input embeddings"),
    ):
        model(**inputs)
    assert nothing_runs()

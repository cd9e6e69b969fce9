"""The engine's five guarantees, each with a check that raises `BrokenGuarantee` with what broke, where and by how much.

Every check returns the largest relative error it found (0 where it compares bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.attach.flow import Flow
from dropflow.engine.tokens.cache import flow_layers
from dropflow.errors import DropflowError, MissingImage, UnsupportedCall, UnsupportedModel
from dropflow.testing.case import (
    BATCH,
    BUDGET,
    ISOLATION,
    MASK,
    NO_OP,
    REFUSAL,
    Case,
    layer_inputs,
    relative_error,
    text_inputs,
)
from dropflow.testing.decoding import WATCH, check_decoding
from dropflow.testing.forecasts import check_forecast
from dropflow.testing.probes import EVERYTHING, RanksByNumbers
from dropflow.testing.static_steps import check_static_steps, static_tokens
from dropflow.testing.step_reads import check_reading_everything, reads
from dropflow.testing.training import check_training, labelled


@torch.no_grad()
def check_no_op(case: Case) -> float:
    """Guarantee 1: keeping everything, or having no images, gives bit-identical logits, loss and tokens."""
    text = case.with_samples([(4,), (7,)])
    runs: list[list[Tensor]] = []
    for attached in (False, True):
        flow = case.attach(EVERYTHING) if attached else None
        model = case.model
        found = [model(**case.inputs).logits, model(**labelled(case)).loss, model.generate(**case.inputs, **BUDGET)]
        if flow is not None:
            flow.detach()
            flow = case.attach()
        runs.append([*found, model(**text.inputs).logits])
        if flow is not None:
            flow.detach()
    told = ("logits", "loss", "generated tokens", "logits of a prompt without images")
    for what, plain, flowing in zip(told, *runs, strict=True):
        if not torch.equal(plain, flowing):
            by = relative_error(flowing.float(), plain.float())
            raise case.broken(
                NO_OP, f"{what} differ from the plain model's by {by:.1e} (relative), expected equal bits"
            )
    check_reading_everything(case)
    return 0.0


def check_drop_is_mask(case: Case) -> float:
    """Guarantee 2: prefill, decoding, loss and gradients equal those of a full-length run that masks dropped tokens."""
    return max(check_inference(case), check_training(case))


def check_inference(case: Case) -> float:
    """The part of guarantee 2 that concerns prompts and their answers."""
    worst = check_prefill(case)
    _check_decoding(case)
    return worst


@torch.no_grad()
def check_prefill(case: Case) -> float:
    """The part of guarantee 2 that concerns one forward of a prompt."""
    real = case.real
    watched = {**case.policy, "stages": {**case.policy["stages"], WATCH: {"use": RanksByNumbers}}}
    with case.attach(watched) as flow, layer_inputs(case) as got, text_inputs(case.text) as given:
        logits, encodes = case.model(**case.inputs).logits, flow.plan.encode_at
        live, merges = flow.live(), flow.merges()
        watch: Any = dict(flow.plan.stages)[WATCH]
    for stage, boundary in watch.faults:
        raise case.broken(MASK, f"stages.{stage} ranks visual tokens by NaN at boundary {boundary}; return numbers")
    replaced = given[0] if encodes else {}
    with case.oracle(case.model, live, case.adapter, merges=merges, **replaced) as oracle:
        expected = case.model(**case.inputs, use_cache=False).logits
    worst, compacted, allowed = 0.0, False, case.tiny.tolerance
    for layer, states in enumerate(got):
        compacted = compacted or not torch.equal(live[layer], real)
        for sample, own in enumerate(live[layer]):
            rows = states.select(-3, sample)
            slots = rows[..., -int(own.sum()) :, :] if compacted else rows[..., own, :]
            error = relative_error(slots, oracle.hidden[layer].select(-3, sample)[..., own, :])
            if not error < allowed:
                raise case.broken(
                    MASK,
                    f"before layer {layer}, sample {sample}, the states of live tokens differ from the {oracle.name} "
                    f"run's by {error:.1e} (relative), allowed {allowed:.0e}",
                )
            worst = max(worst, error)
    error = relative_error(logits[real], expected[real])
    if not error < allowed:
        raise case.broken(MASK, f"logits differ from the {oracle.name} run's by {error:.1e}, allowed {allowed:.0e}")
    return max(worst, error)


def _held(case: Case, tokens: int) -> Tensor:
    """Which tokens of the prompt each layer's cache holds after the prefill, boolean (layers, batch, tokens)."""
    text: Any = case.adapter(case.model).text
    cache = DynamicCache(config=text.config)
    with case.attach():
        case.model(**case.inputs, **{CACHE_ARGUMENT: cache})
    depth = case.adapter(case.model).shape.layers
    held = torch.zeros(depth, len(case.samples), tokens, dtype=torch.bool)
    for number, layer in flow_layers(cache).items():
        index = layer.full_index()
        held[number].scatter_(1, index.logical, index.filled)
    for number, producer in case.adapter(case.model).shape.producers:  # what it no longer sees, the oracle hides
        held[number] = held[producer]
    return held


@torch.no_grad()
def _check_decoding(case: Case) -> None:
    left = case.padded_left()
    model = left.model
    with left.attach() as flow, text_inputs(left.text) as given:
        with reads(flow, left.real.shape[1], len(left.samples)) as read:
            tokens = model.generate(**left.inputs, **BUDGET)
        live, encodes, merges = flow.live(), flow.plan.encode_at, flow.merges()
        evicting = flow.plan.hooks.implementers("decode_cache")
        static = static_tokens(left)
    check_static_steps(left, static, tokens)
    if evicts_while_decoding(flow):
        return  # the kit records this in the cell
    held = _held(left, live.shape[2]) if evicting else None
    replaced = given[0] if encodes else {}
    replaced |= {"reads": torch.stack(read, 2)} if read else {}
    with left.oracle(model, live, left.adapter, held=held, merges=merges, **replaced) as oracle:
        expected = model.generate(**left.inputs, **BUDGET, use_cache=False)
    if not torch.equal(tokens, expected):
        step = int((tokens != expected).any(0).nonzero()[0]) - left.inputs["input_ids"].shape[1]
        raise left.broken(MASK, f"from decode step {step} on, the generated tokens differ from the {oracle.name} run's")


def evicts_while_decoding(flow: Flow) -> bool:
    """Whether decode steps evict entries depending on generated tokens, so that no single mask describes a run."""
    return any(stage.decode_every for _, stage in flow.plan.hooks.implementers("decode_cache"))


@torch.no_grad()
def check_batch_invariance(case: Case) -> float:
    """Guarantee 3: a sample has the same keeps and logits alone and in a ragged batch; beams have the same keeps."""
    worst = 0.0
    with case.attach() as flow:
        together = case.model(**case.inputs).logits
        live = flow.live()
        again = case.model(**case.inputs).logits
        _check_repeated(case, live, flow.live(), together, again)
        for sample, own in enumerate(case.real):
            logits = case.model(**case.single(sample)).logits[0]
            error = relative_error(together[sample, own], logits)
            if case.drawn[1][sample] and not torch.equal(flow.live()[:, 0], live[:, sample, own]):
                layer = int((flow.live()[:, 0] != live[:, sample, own]).any(1).nonzero()[0])
                raise case.broken(
                    BATCH,
                    f"sample {sample} keeps other tokens alone than in the batch, from layer {layer} on; check what "
                    "the stage computes over the batch, including padding",
                )
            if not error < case.tiny.tolerance:
                raise case.broken(
                    BATCH,
                    f"logits of sample {sample} alone and in the batch differ by {error:.1e}, "
                    f"allowed {case.tiny.tolerance:.0e}",
                )
            worst = max(worst, error)
    _check_beams(case.padded_left())
    check_decoding(case)
    return worst


def _check_repeated(case: Case, live: Tensor, live_again: Tensor, logits: Tensor, again: Tensor) -> None:
    """Check that two equal calls give the same result, bit for bit."""
    if torch.equal(live, live_again) and torch.equal(logits, again):
        return
    layer, sample = next(iter((live != live_again).any(2).nonzero().tolist()), (0, 0))
    raise case.broken(
        ISOLATION,
        f"a second, equal call keeps other tokens of sample {sample} from layer {layer} on, or gives other logits; a "
        "stage keeps state between calls or draws at random: check what its hooks read besides their payload",
    )


def _check_beams(left: Case) -> None:
    """Check that every beam keeps the tokens of its sample.

    Nothing is checked for a family without beam search, or whose own way of repeating images is refused or wrong: the
    Qwen3.5 of transformers 5.20 gives the copies of a sample other pictures.
    """

    def generate(beams: int) -> None:
        left.model.generate(**left.inputs, do_sample=False, num_beams=beams, max_new_tokens=1)

    try:
        with text_inputs(left.text) as seen:
            generate(2)
    except ValueError:
        return
    embeds = seen[0]["embeds"]
    if not torch.equal(embeds[::2], embeds[1::2]):
        return
    with left.attach() as flow:
        live = []
        for beams in (1, 2):
            try:
                generate(beams)
            except UnsupportedModel:
                return
            live.append(flow.live())
    if not torch.equal(live[1], live[0].repeat_interleave(2, 1)):
        row = int((live[1] != live[0].repeat_interleave(2, 1)).any(2).any(0).nonzero()[0])
        raise left.broken(BATCH, f"beam {row % 2} of sample {row // 2} keeps other tokens than the sample alone")


def fingerprint(model: Any) -> list[Any]:
    """Everything that attaching could leave on a model: hooks, modules, instance attributes, parameters."""
    state: list[Any] = [list(model.state_dict())]
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        state.append(
            (name, type(module), *map(len, hooks), sorted(k for k in module.__dict__ if not k.startswith("_")))
        )
    return state


@torch.no_grad()
def check_isolation(case: Case) -> float:
    """Guarantee 4: a detached flow or an aborted forward leaves no trace."""
    model = case.model
    plain, before = model(**case.inputs).logits, fingerprint(model)
    with case.attach():
        flowing = model(**case.inputs).logits
        with _failing(case), _expected(RuntimeError("aborted")):
            model(**case.inputs)
        if not torch.equal(model(**case.inputs).logits, flowing):
            raise case.broken(ISOLATION, "an aborted forward changes the logits of the next one")
    left = [own for own, was in zip(fingerprint(model), before, strict=True) if own != was]
    if left:
        raise case.broken(ISOLATION, f"detaching leaves hooks or attributes on {[entry[0] for entry in left]}")
    if not torch.equal(model(**case.inputs).logits, plain):
        raise case.broken(ISOLATION, "logits after detaching are not the plain model's")
    return 0.0


@contextmanager
def _failing(case: Case) -> Iterator[None]:
    """Make the fourth decoder layer raise."""

    def fail(*_: Any) -> None:
        raise RuntimeError("aborted")

    layer = case.adapter(case.model).text._modules["layers"][3]
    handle = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _expected(error: Exception) -> Iterator[None]:
    try:
        yield
    except type(error) as got:
        if str(got) != str(error):
            raise


@torch.no_grad()
def check_refusals(case: Case) -> float:
    """Guarantee 5: a call that cannot be correct raises before any decoder layer runs, and the model still works."""
    model, text = case.model, case.adapter(case.model).text
    without = {k: v for k, v in case.inputs.items() if k in ("input_ids", "attention_mask")}
    asks: tuple[tuple[str, dict[str, Any], type[DropflowError]], ...] = (
        ("output_hidden_states", case.inputs | {"output_hidden_states": True}, UnsupportedCall),
        ("placeholders without an image", without, MissingImage),
    )
    with case.attach() as flow:
        if not flow.plan.uniform:  # layers will hold different tokens
            cache = DynamicCache(config=text.config)
            cache.offloading = True
            asks += (("an offloaded cache", case.inputs | {CACHE_ARGUMENT: cache}, UnsupportedModel),)
        flowing = model(**case.inputs).logits
        check_forecast(case, flow)
        for what, inputs, error in asks:
            with layer_inputs(case) as ran:
                message = _refused(lambda inputs=inputs: model(**inputs), error)  # type: ignore[misc]
            if message is None:
                raise case.broken(REFUSAL, f"{what} is not refused with {error.__name__}")
            if ran:
                raise case.broken(REFUSAL, f"{what} is refused only after {len(ran)} layers have run")
            if not torch.equal(model(**case.inputs).logits, flowing):
                raise case.broken(REFUSAL, f"after {what} was refused, the model gives other logits")
    return 0.0


def _refused(run: Callable[[], Any], error: type[DropflowError]) -> str | None:
    try:
        run()
    except error as refusal:
        return str(refusal)
    return None


CHECKS: dict[str, Callable[[Case], float]] = {
    NO_OP: check_no_op,
    MASK: check_drop_is_mask,
    BATCH: check_batch_invariance,
    ISOLATION: check_isolation,
    REFUSAL: check_refusals,
}
"""Guarantee -> its check."""

"""An attached policy leaves no trace: after detach, after an abort, between models and between threads."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from tiny import HIDROP, RAGGED, policy, prompt, tiny_llava
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dropflow
from dropflow import Keep, PruneCall, Stage, hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.testing.guarantees import fingerprint

BUDGET = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@torch.no_grad()
def test_detach_leaves_no_trace(llava: Any) -> None:
    inputs = prompt()
    plain = llava(**inputs).logits  # transformers installs hooks of its own at the first forward
    before = fingerprint(llava)
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    flow = dropflow.attach(llava, HIDROP)
    llava.generate(**inputs, **BUDGET)
    assert list(llava.state_dict()) == before[0]
    flow.detach()
    flow.detach()
    assert fingerprint(llava) == before
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert torch.equal(llava(**inputs).logits, plain)


@pytest.mark.parametrize("where", ["vision_tower", "layers.0", "layers.3", "norm", "lm_head"])
@torch.no_grad()
def test_an_aborted_forward_leaves_no_state(where: str) -> None:
    model, inputs = tiny_llava(), prompt()
    plain = model(**inputs).logits
    modules = dict(model.named_modules())
    name = next(n for n in modules if n.endswith(where) and ("language" in n or "." not in where))
    with dropflow.attach(model, HIDROP):
        expected = model(**inputs).logits
        for error in (RuntimeError, KeyboardInterrupt):
            handle = modules[name].register_forward_pre_hook(lambda *_, e=error: (_ for _ in ()).throw(e("stop")))
            with pytest.raises(error):
                model(**prompt(side="right"))
            handle.remove()
            assert torch.equal(model(**inputs).logits, expected)
        other: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: other.append(forward(model, inputs)))
        thread.start()
        thread.join(20)
        assert torch.equal(other[0], expected), "the aborted call still holds the lock"
    assert torch.equal(model(**inputs).logits, plain)


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits


def test_two_threads_on_one_model_never_mix() -> None:
    model = tiny_llava()
    prompts = [prompt(((3, "I", 5),)), prompt((("I", 2, "I", 9), (4, "I", 3)), seed=7)]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    with dropflow.attach(model, HIDROP):
        with torch.no_grad():
            expected = [model.generate(**inputs, **BUDGET) for inputs in prompts]

        def work(number: int) -> None:
            with torch.no_grad():
                results[number] += [model.generate(**prompts[number], **BUDGET) for _ in range(4)]

        threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for number in (0, 1):
        assert len(results[number]) == 4
        assert all(torch.equal(tokens, expected[number]) for tokens in results[number])


def test_two_models_with_two_policies_in_two_threads() -> None:
    models, policies, inputs = [tiny_llava(seed=s) for s in (0, 1)], [HIDROP, RAGGED], prompt()
    expected, got = [], {}
    for model, which in zip(models, policies, strict=True):
        with dropflow.attach(model, which):
            expected.append(forward(model, inputs))
    with dropflow.attach(models[0], policies[0]), dropflow.attach(models[1], policies[1]):
        threads = [
            threading.Thread(target=lambda n=n: got.setdefault(n, [forward(models[n], inputs) for _ in range(5)]))
            for n in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for number in (0, 1):
        assert all(torch.equal(logits, expected[number]) for logits in got[number])


@torch.no_grad()
def test_a_cache_written_under_a_policy_is_refused_without_it(llava: Any) -> None:
    cache = DynamicCache()
    token = torch.tensor([[5]])
    with dropflow.attach(llava, HIDROP):
        llava(**prompt([(3, "I", 5)]), **{CACHE_ARGUMENT: cache})
    with pytest.raises(UnsupportedCall, match="attach the policy again"):
        llava(input_ids=token, **{CACHE_ARGUMENT: cache})
    with dropflow.attach(llava, HIDROP):
        assert torch.isfinite(llava(input_ids=token, **{CACHE_ARGUMENT: cache}).logits).all()


def test_a_model_and_its_flow_are_freed_together() -> None:
    model = tiny_llava(layers=2)
    gone = weakref.ref(model)
    flow = dropflow.attach(model, policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {1: 3}}))
    forward(model, prompt())
    del model, flow
    gc.collect()
    assert gone() is None


def test_one_policy_at_a_time(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP), pytest.raises(UnsupportedModel, match="detach it first"):
        dropflow.attach(llava, RAGGED)
    dropflow.attach(llava, RAGGED).detach()


@torch.no_grad()
def test_a_replica_of_the_model_is_refused(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP):
        replica = copy.copy(llava)  # as made by nn.DataParallel: same hooks, another module
        with pytest.raises(UnsupportedModel, match="DataParallel"):
            replica(**prompt())


@torch.no_grad()
def test_a_failing_stage_gives_its_own_error_and_the_model_still_works(llava: Any) -> None:
    class Broken(Stage[Any]):
        prune_at = (2,)

        @hookimpl
        def prune(self, call: PruneCall) -> Keep:
            del call
            raise ZeroDivisionError("in the plug-in")

    inputs = prompt()
    plain = llava(**inputs).logits
    with dropflow.attach(llava, policy(broken={"use": Broken})):
        with pytest.raises(ZeroDivisionError, match="in the plug-in"):
            llava(**inputs)
        text = prompt(((4,),))
        assert torch.isfinite(llava(**text).logits).all()
    assert torch.equal(llava(**inputs).logits, plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@torch.no_grad()
def test_code_compiled_before_attaching_does_not_go_on_without_the_policy() -> None:
    model, inputs = tiny_llava(layers=2), prompt([(3, "I", 5)])
    which = policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {1: 3}})
    plain = model(**inputs).logits
    with dropflow.attach(model, which):
        pruned = model(**inputs).logits
    assert not torch.allclose(pruned, plain, atol=0.1)
    model.model.language_model.compile(backend="eager")
    whole = torch.compile(model, backend="eager", disable=True)  # `attach` serves what it wraps
    assert torch.allclose(whole(**inputs).logits, plain, atol=1e-4)
    with dropflow.attach(whole, which) as flow:
        assert torch.allclose(whole(**inputs).logits, pruned, atol=1e-4)
        assert flow.live()[1].sum() == 12
    assert torch.allclose(whole(**inputs).logits, plain, atol=1e-4)
    torch.compiler.reset()


def test_parts_that_torch_compile_replaced_are_refused() -> None:
    model = tiny_llava()
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    with pytest.raises(UnsupportedModel, match=r"text decoder: replaced by what torch\.compile returned.*in place"):
        dropflow.attach(model, HIDROP)


def test_an_attached_model_is_not_copied(llava: Any) -> None:
    with dropflow.attach(llava, HIDROP):
        for copying in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UnsupportedModel, match="detach first and attach to the copy"):
                copying(llava)
    assert torch.equal(forward(copy.deepcopy(llava), prompt()), forward(llava, prompt()))


def test_a_detached_flow_does_not_serve_again(llava: Any) -> None:
    flow = dropflow.attach(llava, HIDROP)
    assert flow.attached
    with flow:
        pass
    assert not flow.attached
    with pytest.raises(UnsupportedCall, match=r"'test' was detached.*call `dropflow\.attach` again"), flow:
        pass

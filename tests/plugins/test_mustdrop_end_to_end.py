"""Whole MustDrop against recorded runs of the published code: every layer of the prefill, and every decode step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from mustdrop_goldens import PLACEHOLDER, Golden, golden, recorded_llava, recorded_names
from tiny import relative_error
from torch import Tensor
from watching import Watch, told

import dropflow
from dropflow import hookimpl
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.engine.tokens.cache_layers import FlowLayer
from dropflow.operators.ranking import text_rows
from dropflow_mustdrop import DualAttention, equal_token_number

LAYERS = 32
PRUNED = (2, 6, 10, 14)
PATCHES = 144


def published(recorded: Golden, **changes: Any) -> dict[str, Any]:
    """The published settings at the thresholds of a record."""
    gamma, alpha = recorded["thr"].tolist()
    stages: dict[str, Any] = {
        "merge": {"use": "mustdrop/spatial-merge", "count": "reference"},
        "keys": {"use": "mustdrop/key-set"},
        "filter": {
            "use": Filter,
            "at": [layer + 1 for layer in PRUNED],
            "global_threshold": gamma,
            "individual_threshold": alpha,
        },
        "cache": {"use": "mustdrop/output-aware-cache", "at": PRUNED[0]},
        "watch": {"use": Watch},
    }
    return {"name": "published", "positions": "compact", "stages": stages | changes}


class Filter(DualAttention):
    """The stage itself, remembering the attention it decides by."""

    seen: list[Tensor] = []  # noqa: RUF012  # shared with the test on purpose

    @hookimpl
    def prune(self, call: dropflow.PruneCall) -> Any:
        rows, _ = text_rows(call)
        weights = call.attention_rows(call.boundary - 1, rows).mean(1)[0, :, -call.index.shape[1] :]
        self.seen.append(weights[:, call.image_id[0] >= 0])
        return super().prune(call)


@dataclass
class Calls:
    """What every decoder layer got, one list per forward."""

    hidden: list[list[Tensor]] = field(default_factory=list)
    positions: list[list[Tensor]] = field(default_factory=list)
    caches: list[list[FlowLayer]] = field(default_factory=list)


@contextmanager
def watched(model: Any) -> Iterator[Calls]:
    calls = Calls()
    handles = []
    for number, layer in enumerate(model.get_decoder()._modules["layers"]):

        def before(_: Any, args: Any, kwargs: dict[str, Any], number: int = number) -> None:
            if number == 0:
                calls.hidden.append([])
                calls.positions.append([])
            calls.hidden[-1].append(args[0])
            calls.positions[-1].append(kwargs["position_ids"])

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    yield calls
    for handle in handles:
        handle.remove()


def prompt_of(recorded: Golden) -> tuple[Any, dict[str, Tensor]]:
    """The recorded model, and the prompt with one placeholder per patch, whose id is no word of it."""
    ids = recorded["input_ids"][0].tolist()
    image = next(i for i in range(95, 0, -1) if i not in ids and i not in recorded["generated"][0].tolist())
    pixels = recorded["pixel_values"].flatten(0, -4)
    words: list[int] = []
    for word in ids:
        words += [image] * PATCHES * len(pixels) if word == PLACEHOLDER else [word]
    model = recorded_llava(image)
    model.generation_config.eos_token_id = None
    return model, {"input_ids": torch.tensor([words]), "pixel_values": pixels}


def close(value: Tensor, expected: Tensor, what: str) -> None:
    assert value.shape == expected.shape, what
    assert relative_error(value, expected) <= 1e-4, what


@pytest.mark.parametrize("name", recorded_names("e2e_*"))
@torch.no_grad()
def test_recorded_runs(name: str) -> None:
    recorded = golden(name)
    model, inputs = prompt_of(recorded)
    start, text, images = recorded["v_token_start"], recorded["text_seq"], recorded["image_num"]
    Filter.seen.clear()
    with dropflow.attach(model, published(recorded)) as flow, watched(model) as calls:
        prefill = model(**inputs).logits
        live = flow.live()[:, 0]
        report, prompt = flow.report(), flow._last().prompt
        stages = list(Filter.seen)
        calls.hidden.clear()
        calls.positions.clear()
        budget = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        output = model.generate(**inputs, **budget)

    # indices: the key set, and the survivors of every stage
    rows = recorded["img_seq"] // images
    merged = torch.cat([start + tile * PATCHES + torch.arange(rows) for tile in range(images)])
    assert torch.equal(
        live[0].nonzero()[:, 0], torch.cat((torch.arange(start), merged, live.shape[1] - text + torch.arange(text)))
    )
    keys = recorded["key_set"].sort().values
    assert torch.equal(prompt.protected[0, merged].nonzero()[:, 0], keys)
    events = {event.boundary: event for event in told(flow)}
    before = torch.arange(recorded["img_seq"])
    for stage, layer in enumerate(PRUNED):
        weights, record = stages[stage], f"stage{stage}"
        close(weights, recorded[f"{record}/A"], f"attention at layer {layer}")
        close(weights.sum(0), recorded[f"{record}/G"], f"global score at layer {layer}")
        close(weights.amax(0), recorded[f"{record}/M"], f"individual score at layer {layer}")
        kept = live[layer + 1, merged].nonzero()[:, 0]
        assert torch.equal(kept, recorded[f"{record}/kept_original_vision_index"])
        assert torch.equal(torch.isin(before, kept).nonzero()[:, 0], recorded[f"{record}/kept_after_union"])
        assert bool(torch.isin(keys, kept).all())
        assert torch.equal(torch.isin(kept, keys).nonzero()[:, 0], recorded[f"{record}/key_set_remapped"])
        assert layer + 1 in events
        before = kept

    # lengths, positions and states before every layer
    lengths = recorded["layer_in_len"].tolist()
    assert [int(own.sum()) for own in live] == lengths
    hidden, positions = calls.hidden[0], calls.positions[0]
    for layer in range(LAYERS):
        assert hidden[layer].shape[1] == lengths[layer]
        assert positions[layer].expand(1, -1).tolist() == [list(range(lengths[layer]))]
    for key in recorded.keys():  # noqa: SIM118
        if key.startswith("hidden_in/layer"):
            close(hidden[int(key.removeprefix("hidden_in/layer"))], recorded[key], key)
    close(hidden[0], recorded["inputs_embeds"], "inputs_embeds")
    close(prefill[:, live[-1]], recorded["prefill_logits"], "prefill logits")

    # decoding
    assert output.sequences[0, inputs["input_ids"].shape[1] :].tolist() == recorded["generated"][0, 1:].tolist()
    close(torch.cat(output.logits), recorded["step_logits"], "logits of the steps")
    decoded = torch.tensor([[int(ids) for ids in step] for step in calls.positions[1:]])
    assert torch.equal(decoded, recorded["decode_rope_position"])
    held = [layer.keys.shape[2] for layer in getattr(output, CACHE_ARGUMENT).layers]
    assert held == recorded["decode_kv_len"][-1].tolist()

    # numbers of tokens
    counts = [layer.visual_tokens for layer in report.layers]
    assert counts == [length - start - text for length in lengths]
    assert equal_token_number(counts, images) == recorded["equal_token_number"]
    after = [*counts[1:], counts[-1]]
    assert after == recorded["num_token_per_layer"].tolist()


@pytest.mark.parametrize("name", recorded_names("e2e_*"))
@torch.no_grad()
def test_recorded_caches(name: str) -> None:
    from transformers import DynamicCache

    recorded = golden(name)
    model, inputs = prompt_of(recorded)
    full, reduced = DynamicCache(), DynamicCache()
    with dropflow.attach(model, published(recorded, cache=None)):
        model(**inputs, **{CACHE_ARGUMENT: full})
    with dropflow.attach(model, published(recorded)) as flow:
        model(**inputs, **{CACHE_ARGUMENT: reduced})
        live = flow.live()[:, 0]
    assert [layer.keys.shape[2] for layer in full.layers] == recorded["kv_len_before_policy"].tolist()
    assert [layer.keys.shape[2] for layer in reduced.layers] == recorded["kv_len_after_prefill"].tolist()
    final = live[-1].nonzero()[:, 0]
    for number, (before, after) in enumerate(zip(full.layers, reduced.layers, strict=True)):
        entries = before.index.logical[0]
        chosen = torch.isin(entries, final).nonzero()[:, 0] if number >= PRUNED[0] else torch.arange(len(entries))
        assert torch.equal(after.index.logical[0], entries[chosen])
        assert torch.equal(after.keys, before.keys[:, :, chosen])  # gathered, never computed or rotated again
        assert torch.equal(after.values, before.values[:, :, chosen])
        if PRUNED[0] <= number <= PRUNED[-1]:
            stage = sum(number > layer for layer in PRUNED)
            assert torch.equal(chosen, recorded[f"kv_select/stage{stage}"])
    for key in recorded.keys():  # noqa: SIM118
        if key.startswith("kv_after_prefill/k"):
            number = int(key.removeprefix("kv_after_prefill/k"))
            close(reduced.layers[number].keys, recorded[key], key)
            close(reduced.layers[number].values, recorded[f"kv_after_prefill/v{number}"], key)


@torch.no_grad()
def test_thresholds_that_drop_nothing_leave_the_dense_model_on_merged_tokens() -> None:
    recorded = golden("e2e_b_medium")
    model, inputs = prompt_of(recorded)
    keep = {
        "use": "mustdrop/dual-attention",
        "at": [3, 7, 11, 15],
        "global_threshold": 1.0,
        "individual_threshold": 0.0,
    }
    with dropflow.attach(model, published(recorded, filter=keep)) as flow:
        logits = model(**inputs).logits[:, flow.live()[-1, 0]]
        report = flow.report()
    dense = model(inputs_embeds=recorded["inputs_embeds"]).logits
    assert relative_error(logits, dense) <= 1e-5
    assert equal_token_number([layer.visual_tokens for layer in report.layers]) == recorded["img_seq"]


@torch.no_grad()
def test_a_cut_is_the_dense_layer_and_then_its_rows() -> None:
    recorded = golden("e2e_b_medium")
    model, inputs = prompt_of(recorded)
    outputs: list[Tensor] = []
    layer = model.get_decoder()._modules["layers"][2]
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    with dropflow.attach(model, published(recorded)), watched(model) as calls:
        model(**inputs)
    handle.remove()
    start, size = recorded["v_token_start"], recorded["img_seq"]
    kept = recorded["stage0/merged_indices"]
    assert torch.equal(kept[start:-9] - start, recorded["stage0/kept_after_union"])
    assert outputs[0].shape[1] == start + size + 9
    assert torch.equal(calls.hidden[0][3], outputs[0][:, kept])

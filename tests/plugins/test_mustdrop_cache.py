"""The output-aware cache: survivors after the prefill, and eviction by what the answer attends to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import RAGGED, policy, prompt, relative_error, tiny_llava
from torch import Tensor
from transformers import DynamicCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import PolicyError
from dropflow.operators.selection import keep_top

CACHE = {"use": "mustdrop/output-aware-cache", "at": 1}
BUDGET = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@torch.no_grad()
def test_layers_from_the_boundary_on_hold_the_final_survivors_of_any_method(llava: Any) -> None:
    inputs = prompt()
    caches = {}
    for name, stages in {"full": {}, "reduced": {"cache": CACHE}}.items():
        with dropflow.attach(llava, policy(**RAGGED["stages"], **stages)) as flow:
            caches[name] = DynamicCache()
            llava(**inputs, **{CACHE_ARGUMENT: caches[name]})
            live = flow.live()
    longest = int(live[-1].sum(1).max())
    indices = [layer.index for layer in caches["reduced"].layers]
    assert [indices[a] is indices[a + 1] for a in range(5)] == [False, False, True, False, True]
    assert [layer.keys.shape[2] for layer in caches["reduced"].layers] == [inputs["input_ids"].shape[1], *[longest] * 5]
    for number in range(1, 6):
        before, after = caches["full"].layers[number], caches["reduced"].layers[number]
        for sample in range(3):
            final = live[-1, sample].nonzero()[:, 0]
            own = after.index.logical[sample, -len(final) :]
            assert torch.equal(own, final)
            valid = (
                before.index.valid[sample]
                if before.index.valid is not None
                else torch.ones(before.keys.shape[2]).bool()
            )
            entries = [int(((before.index.logical[sample] == token) & valid).nonzero()) for token in final]
            assert torch.equal(after.keys[sample, :, -len(final) :], before.keys[sample, :, entries])


@torch.no_grad()
def test_with_an_exit_the_survivors_are_those_of_the_last_layer_with_vision(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    stages = policy(
        pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 7, 4: 2}}, exit={"use": "hidrop/early-exit", "at": 5}
    )["stages"]
    with dropflow.attach(llava, policy(**stages, cache=CACHE)):
        output = llava.generate(**inputs, **BUDGET, return_dict_in_generate=True)
    assert [layer.keys.shape[2] - 5 for layer in getattr(output, CACHE_ARGUMENT).layers] == [25, 11, 11, 11, 11, 9]


def decode(
    model: Any, inputs: dict[str, Tensor], which: dict[str, Any], tokens: Tensor
) -> tuple[list[Tensor], list[Any]]:
    """Logits of every decode step, and the logical tokens each layer held before it."""
    cache, mask = DynamicCache(), inputs["attention_mask"]
    logits: list[Tensor] = []
    held: list[Any] = []
    with dropflow.attach(model, which):
        model(**inputs, **{CACHE_ARGUMENT: cache})
        for token in tokens.T:
            held.append([held_tokens(layer.full_index()) for layer in cache.layers])
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            ids = (mask.cumsum(1) - 1)[:, -1:]
            logits.append(
                model(
                    input_ids=token[:, None], attention_mask=mask, position_ids=ids, **{CACHE_ARGUMENT: cache}
                ).logits[:, -1]
            )
    return logits, held


def held_tokens(index: Any) -> list[set[int]]:
    valid = torch.ones_like(index.logical).bool() if index.valid is None else index.valid
    return [set(row[real].tolist()) for row, real in zip(index.logical, valid, strict=True)]


@pytest.mark.parametrize("rule", [{"threshold": 0.1}, {"budget": 4}], ids=["threshold", "budget"])
@torch.no_grad()
def test_eviction_while_decoding_equals_hiding_what_nobody_attended_to(rule: dict[str, Any]) -> None:
    """An eager, full-length model whose keys are hidden by hand, and whose own maps say what goes."""
    inputs = prompt(((3, "I", 5), ("I", 2, "I", 9)))
    tokens = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(3))
    which = policy(cache=CACHE | {"interval": 2} | rule)
    logits, held = decode(tiny_llava(), inputs, which, tokens)
    model, cache, mask = tiny_llava(attention="eager"), DynamicCache(), inputs["attention_mask"]
    total = mask.shape[1]
    image = torch.where(inputs["input_ids"] == 98, (inputs["input_ids"] == 98).cumsum(1).sub(1) // 16, -1)
    image[1] += image[1].ge(0)  # numbered through the batch
    hidden = [torch.zeros(2, total + 6, dtype=torch.bool) for _ in range(6)]
    seen = [torch.zeros(2, total) for _ in range(6)]
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, n=number: (
                args,
                kwargs | {"attention_mask": hide(kwargs["attention_mask"], hidden[n])},
            ),
            with_kwargs=True,
        )
        for number, layer in enumerate(model.get_decoder().layers)
    ]
    model(**inputs, **{CACHE_ARGUMENT: cache})
    evicted = 0
    for step, token in enumerate(tokens.T, start=1):
        for number in range(6):
            real = mask[:, :total].bool() & ~hidden[number][:, :total]
            for sample in range(2):
                expected = set(real[sample].nonzero()[:, 0].tolist()) | set(range(total, total + step - 1))
                padding = set((mask[sample, :total] == 0).nonzero()[:, 0].tolist())
                assert held[step - 1][number][sample] - padding == expected, (step, number, sample)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        ids = (mask.cumsum(1) - 1)[:, -1:]
        output = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=ids,
            **{CACHE_ARGUMENT: cache},
            output_attentions=True,
        )
        assert relative_error(logits[step - 1], output.logits[:, -1]) < 1e-5, step
        for number in range(1, 6):
            now = output.attentions[number].mean(1)[:, 0, :total]
            seen[number] = torch.maximum(seen[number], now)
            if step % 2 == 0:
                present = torch.where(hidden[number][:, :total], -1, image)
                stays = seen[number] >= 0.1 if "threshold" in rule else keep_top(seen[number], present, [4] * 3)
                hidden[number][:, :total] |= (image >= 0) & ~stays
                evicted += int(hidden[number].sum())
    for handle in handles:
        handle.remove()
    assert evicted > 0
    assert not hidden[0].any()


def hide(mask: Tensor, hidden: Tensor) -> Tensor:
    columns = hidden[:, None, None, : mask.shape[-1]].expand_as(mask)
    if mask.dtype == torch.bool:
        return mask & ~columns
    return mask.masked_fill(columns, torch.finfo(mask.dtype).min)


@torch.no_grad()
def test_protected_entries_are_never_evicted() -> None:
    model, inputs = tiny_llava(grid=6), prompt(grid=6)
    which = policy(keys={"use": "mustdrop/key-set", "share": 0.2}, cache=CACHE | {"interval": 1, "threshold": 1.0})
    with dropflow.attach(model, which) as flow:
        output = model.generate(**inputs, **BUDGET, return_dict_in_generate=True)
        protected = flow._last().prompt.protected
        text = flow._last().prompt.text
    assert protected.sum(1).tolist() == [8, 16, 0]
    for layer in getattr(output, CACHE_ARGUMENT).layers[1:]:
        tokens = held_tokens(layer.full_index())
        for sample in range(3):
            expected = (protected | text)[sample].nonzero()[:, 0].tolist()
            assert {t for t in tokens[sample] if t < protected.shape[1]} == set(expected)


@torch.no_grad()
def test_what_was_attended_to_follows_beams_and_crops(llava: Any) -> None:
    inputs = prompt(((3, "I", 5), (2, "I", 9)))
    which = policy(cache=CACHE | {"interval": 2, "budget": 5})
    with dropflow.attach(llava, which):
        cache = DynamicCache()
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        token, mask = torch.tensor([[5], [6]]), inputs["attention_mask"]
        mask = torch.cat((mask, torch.ones_like(token)), 1)
        llava(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: cache})
        layer = cache.layers[3]
        notes = layer.recall("cache")
        assert notes.shape == (2, layer.keys.shape[2])
        assert (notes > 0).any()
        cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(layer.recall("cache"), notes[[1, 0]])
        cache.crop(-1)
        assert torch.equal(layer.recall("cache"), notes[[1, 0], :-1])
        beams = llava.generate(**inputs, **(BUDGET | {"num_beams": 2}))
        own = {"input_ids": inputs["input_ids"][1:], "pixel_values": inputs["pixel_values"][1:]}
        alone = llava.generate(**own, **(BUDGET | {"num_beams": 2}))
    assert inputs["attention_mask"][1].all()
    assert torch.equal(beams[1], alone[0])


@torch.no_grad()
def test_decoding_reads_no_attention_unless_asked(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tapped: list[str] = []
    monkeypatch.setattr("dropflow.engine.decoder.cache_stages.tapped", lambda *_: tapped.append("tap"))
    with dropflow.attach(llava, policy(cache=CACHE)):
        llava.generate(**prompt(), **BUDGET)
    assert not tapped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 2}, r"stages\.cache: expected `threshold` or `budget`"),
        ({"threshold": 0.1}, r"stages\.cache: expected `threshold` or `budget`"),
        ({"interval": 2, "threshold": 0.1, "budget": 3}, r"stages\.cache: expected `threshold` or `budget`"),
        ({"interval": -1}, r"stages\.cache\.interval: input should be greater than or equal to 0"),
        ({"at": 9}, r"stages\.cache\.at: expected a boundary from 0 to 6"),
    ],
)
def test_faults_are_named(llava: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dropflow.attach(llava, policy(cache=CACHE | options))


@torch.no_grad()
def test_stages_after_one_another_read_what_is_left(llava: Any) -> None:
    inputs = prompt()
    tokens = torch.full((3, 6), 5)
    evicting = {**CACHE, "interval": 1, "budget": 3}
    one, held = decode(llava, inputs, policy(cache=evicting), tokens)
    two, held_by_two = decode(llava, inputs, policy(cache=evicting, again=evicting), tokens)
    assert held_by_two == held
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_boundary_after_the_exit_is_refused(llava: Any) -> None:
    stages = {"exit": {"use": "hidrop/early-exit", "at": 3}, "cache": {**CACHE, "at": 3}}
    with pytest.raises(PolicyError, match=r"stages\.cache\.at: no visual token is left from boundary 3 on; .* 0 to 2"):
        dropflow.attach(llava, policy(**stages))

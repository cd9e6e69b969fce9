"""Every way in which `generate` and callers run a model gives the same result as the masked run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counted_graphs import Graphs, graphs
from tiny import CHUNKS_IMAGES, HIDROP, IMAGE, KEEP_ALL, RAGGED, policy, prompt, relative_error, tiny_llava
from transformers import DynamicCache

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import MissingImage, UnsupportedCall
from dropflow.testing import MaskedOracle

__all__ = ["graphs"]  # a fixture

BUDGET = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


MODES: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True}]


def generate(model: Any, inputs: dict[str, Any], mode: dict[str, Any]) -> torch.Tensor:
    """Generated tokens in one mode, with the same random seed every time."""
    torch.manual_seed(0)
    tokens: torch.Tensor = model.generate(**inputs, **(BUDGET | mode))
    return tokens


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("which", [KEEP_ALL, policy()], ids=["keeps everything", "no stage"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_policy_that_drops_nothing_is_bit_identical(
    llava: Any, which: dict[str, Any], side: str, mode: dict[str, Any]
) -> None:
    inputs = prompt(side=side)
    runs = []
    for attached in (False, True):
        flow = dropflow.attach(llava, which) if attached else None
        tokens = generate(llava, prompt(), mode)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        output = llava(**inputs)
        loss = llava(**inputs, labels=labels).loss
        runs.append((tokens, output.logits, loss))
        if flow is not None:
            flow.detach()
    for plain, flowing in zip(*runs, strict=True):
        assert torch.equal(plain, flowing)


@torch.no_grad()
def test_an_open_window_is_bit_identical(llava: Any) -> None:
    inputs = prompt()
    stages = {"inject": {"use": "hidrop/late-injection", "at": 0}, "exit": {"use": "hidrop/early-exit", "at": 6}}
    plain = llava(**inputs).logits
    with dropflow.attach(llava, policy(**stages)):
        assert torch.equal(llava(**inputs).logits, plain)
        core = llava.model(**inputs).last_hidden_state
    assert torch.equal(llava.lm_head(core), plain)


@torch.no_grad()
def test_a_model_without_its_head_flows_too(llava: Any) -> None:
    inputs = prompt()
    with dropflow.attach(llava, HIDROP):
        expected = llava(**inputs).logits
    with dropflow.attach(llava.model, HIDROP) as flow:
        hidden = llava.model(**inputs).last_hidden_state
        assert flow.report().layers[2].visual_tokens > 0
    assert torch.equal(llava.lm_head(hidden), expected)


@torch.no_grad()
def test_decoding_holds_what_the_schedule_says(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    text = 9
    with dropflow.attach(llava, HIDROP) as flow:
        output = llava.generate(**inputs, **BUDGET, return_dict_in_generate=True)
        report = flow.report()
    cache = getattr(output, CACHE_ARGUMENT)
    visual = [0, 16, 7, 7, 2, 0]
    generated = BUDGET["max_new_tokens"] - 1  # the last token is never fed back
    assert [layer.keys.shape[-2] for layer in cache.layers] == [text + n + generated for n in visual]
    assert cache.get_seq_length() == text + 16 + generated
    assert [layer.visual_tokens for layer in report.layers] == visual
    assert [layer.kv_entries for layer in report.layers] == [text + n for n in visual]
    assert report.average_visual_tokens == sum(visual) / 6
    assert report.entry_visual_tokens == 16


@torch.no_grad()
def test_prompt_lookup_gives_the_greedy_tokens(llava: Any) -> None:
    inputs = prompt([(6, "I", 9)])
    inputs["input_ids"][0, 1:4] = inputs["input_ids"][0, -3:]  # something to look up
    with dropflow.attach(llava, HIDROP) as flow:
        greedy = llava.generate(**inputs, **BUDGET)
        live = flow.live()
        looked_up = llava.generate(**inputs, **BUDGET, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
        assert torch.equal(flow.live()[:, :, : live.shape[2]], live), "draft tokens changed the selection"
    assert torch.equal(looked_up, greedy)


@torch.no_grad()
def test_chunked_prefill_equals_the_masked_run(llava: Any) -> None:
    inputs = prompt([(3, "I", 12)])
    with dropflow.attach(llava, RAGGED) as flow:
        if not CHUNKS_IMAGES:
            with pytest.raises(MissingImage):
                llava.generate(**inputs, **BUDGET, prefill_chunk_size=21)
            return
        tokens = llava.generate(**inputs, **BUDGET, prefill_chunk_size=21)
        live = flow.live()
    assert live.shape[2] == inputs["input_ids"].shape[1]
    with MaskedOracle(llava, live):
        expected = llava.generate(**inputs, **BUDGET, use_cache=False)
    assert torch.equal(tokens, expected)


@torch.no_grad()
def test_a_second_turn_with_a_new_image_on_the_returned_cache(llava: Any) -> None:
    first, later = prompt([(3, "I", 5)]), prompt([(4, "I", 3)], seed=2)
    with dropflow.attach(llava, HIDROP) as flow:
        turn = llava.generate(**first, **BUDGET, return_dict_in_generate=True)
        lives = [flow.live()]
        said = turn.sequences.shape[1]
        ids = torch.cat((turn.sequences, later["input_ids"]), 1)
        mask = torch.ones_like(ids)
        answer = llava.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=later["pixel_values"],
            **{CACHE_ARGUMENT: getattr(turn, CACHE_ARGUMENT)},
            **BUDGET,
        )
        lives.append(flow.live())
    # the last token of the first turn is first fed with the second
    spoken = torch.ones(6, 1, said - lives[0].shape[2] - 1, dtype=torch.bool)
    live = torch.cat((lives[0], spoken, lives[1]), 2)
    with MaskedOracle(llava, live):
        pixels = torch.cat((first["pixel_values"], later["pixel_values"]))
        expected = llava.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **BUDGET, use_cache=False)
    assert torch.equal(answer, expected)


@torch.no_grad()
def test_a_text_turn_between_images_is_fitted_to_each_layers_cache(llava: Any) -> None:
    inputs = prompt()
    more = torch.randint(3, 97, (3, 4), generator=torch.Generator().manual_seed(3))
    with dropflow.attach(llava, RAGGED) as flow:
        cache = DynamicCache(config=llava.config.text_config)
        llava(**inputs, **{CACHE_ARGUMENT: cache})
        live = flow.live()
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(more)), 1)
        position = mask.cumsum(1) - 1
        logits = llava(
            input_ids=more, attention_mask=mask, **{CACHE_ARGUMENT: cache}, position_ids=position[:, -4:]
        ).logits
        inputs_again = {"input_ids": torch.cat((inputs["input_ids"], more), 1), "pixel_values": inputs["pixel_values"]}
    with MaskedOracle(llava, live):
        # without position ids the first call counted padding, too
        position[:, :-4] = torch.arange(position.shape[1] - 4)
        expected = llava(**inputs_again, attention_mask=mask, position_ids=position, use_cache=False).logits[:, -4:]
    assert relative_error(logits, expected) < 1e-5


@torch.no_grad()
def test_embedded_prompts_flow_like_token_ids(llava: Any) -> None:
    inputs = prompt([(3, "I", 5)])
    embeds = llava.get_input_embeddings()(inputs["input_ids"])
    merged = embeds.clone()
    merged[0, 4:20] = llava.get_image_features(inputs["pixel_values"]).pooler_output[0]
    with dropflow.attach(llava, HIDROP) as flow:
        expected = llava(**inputs).logits
        placeholders = llava(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits
        with flow.visual(inputs["input_ids"] == IMAGE):
            own = llava(inputs_embeds=merged).logits
        tokens = llava.generate(**inputs, **BUDGET)[:, inputs["input_ids"].shape[1] :]
        embedded = llava.generate(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], **BUDGET)
    assert torch.equal(placeholders, expected)
    assert torch.equal(own, expected)
    assert torch.equal(embedded, tokens)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_stated_visual_tokens_hold_for_the_prompt_of_generate(llava: Any, beams: int) -> None:
    inputs, mode = prompt(), BUDGET | {"num_beams": beams}
    visual = inputs["input_ids"] == IMAGE
    merged = llava.get_input_embeddings()(inputs["input_ids"])
    merged[visual] = torch.cat(tuple(llava.get_image_features(inputs["pixel_values"]).pooler_output))
    embedded = {"inputs_embeds": merged, "attention_mask": inputs["attention_mask"]}
    with dropflow.attach(llava, HIDROP) as flow:
        expected = llava.generate(**inputs, **mode)[:, visual.shape[1] :]
        with flow.visual(visual):
            assert torch.equal(llava.generate(**embedded, **mode), expected)
        for wrong in (visual[:, 1:], visual[:2]):
            stated = pytest.raises(UnsupportedCall, match=r"visual: stated for \(\d, \d+\) \(batch, tokens\), but")
            with flow.visual(wrong), stated:
                llava(**embedded)
        with pytest.raises(UnsupportedCall, match=r"visual: expected a torch\.bool"), flow.visual(visual.long()):
            pass


@torch.no_grad()
def test_every_sample_is_alone_in_its_batch(llava: Any) -> None:
    samples = [(3, "I", 5), ("I", 2, "I", 9), (4,), (1, "I", 11)]
    for side in ("left", "right"):
        inputs = prompt(samples, side=side)
        for which in (HIDROP, RAGGED):
            with dropflow.attach(llava, which) as flow:
                together = llava(**inputs).logits
                live = flow.live()
                images = iter(inputs["pixel_values"])
                for number, parts in enumerate(samples):
                    own = inputs["attention_mask"][number].bool()
                    alone = {"input_ids": inputs["input_ids"][number, own][None]}
                    count = sum(part == "I" for part in parts)
                    if count:
                        alone["pixel_values"] = torch.stack([next(images) for _ in range(count)])
                    logits = llava(**alone).logits[0]
                    assert relative_error(together[number, own], logits) < 1e-5
                    if count:
                        assert torch.equal(flow.live()[:, 0], live[:, number, own])


@torch.no_grad()
def test_a_text_only_sample_is_plain(llava: Any) -> None:
    inputs = prompt([(7,), (4,)])
    expected = llava(**inputs).logits
    with dropflow.attach(llava, HIDROP):
        assert torch.equal(llava(**inputs).logits, expected)


@torch.no_grad()
def test_flash_attention_contract_on_cpu() -> None:
    from flash_stand_in import registered

    inputs = prompt()
    with registered() as name:
        model, reference = tiny_llava(), tiny_llava()
        model.get_decoder().config._attn_implementation = name
        for which in (HIDROP, RAGGED):
            with dropflow.attach(model, which) as flow:
                logits, live = model(**inputs).logits, flow.live()
                tokens = [generate(model, inputs, mode) for mode in MODES]
            with MaskedOracle(reference, live):
                real = inputs["attention_mask"].bool()
                assert relative_error(logits[real], reference(**inputs, use_cache=False).logits[real]) < 1e-5
                expected = [generate(reference, inputs, mode | {"use_cache": False}) for mode in MODES]
            assert all(torch.equal(got, wanted) for got, wanted in zip(tokens, expected, strict=True))


@torch.no_grad()
def test_compiled_layers_are_not_recompiled_for_other_keeps(graphs: Graphs) -> None:
    model, plain, inputs = tiny_llava(), tiny_llava(), prompt([(3, "I", 5)])
    other = policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 9, 4: 3}})
    with dropflow.attach(plain, HIDROP):
        expected, tokens = plain(**inputs).logits, plain.generate(**inputs, **BUDGET)
    with dropflow.attach(plain, other):
        expected_other = plain(**inputs).logits
    for layer in model.get_decoder().layers[::2]:  # whole, pruned once, and twice
        layer.compile(dynamic=True, backend=graphs)
    with dropflow.attach(model, HIDROP):
        assert relative_error(model(**inputs).logits, expected) < 1e-5
        assert torch.equal(model.generate(**inputs, **BUDGET), tokens)
        before = graphs.made
    with dropflow.attach(model, other):
        assert relative_error(model(**inputs).logits, expected_other) < 1e-5
    assert graphs.made == before > 0

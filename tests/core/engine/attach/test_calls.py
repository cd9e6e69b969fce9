"""Other ways to call an attached model than `model(pixel_values=...)` are correct, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import HIDROP, IMAGE, policy, prompt, relative_error, tiny_llava

import dropflow
from dropflow.backbone.versions import CACHE_ARGUMENT
from dropflow.errors import MissingImage, UnsupportedCall
from dropflow.testing import tiny_models

PRUNED = policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 7, 4: 2}})


def merged_embeddings(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Embeddings of the prompt with the image features at their placeholders."""
    embeds: torch.Tensor = model.get_input_embeddings()(inputs["input_ids"])
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    rows = torch.cat(list(features)).to(embeds)
    return embeds.masked_scatter((inputs["input_ids"] == IMAGE)[:, :, None], rows)


@torch.no_grad()
def test_the_decoder_called_by_itself_is_pruned_where_somebody_says_what_is_visual(llava: Any) -> None:
    inputs = prompt()
    visual = inputs["input_ids"] == IMAGE
    arguments = {"inputs_embeds": merged_embeddings(llava, inputs), "attention_mask": inputs["attention_mask"]}
    decoder = llava.model.language_model
    plain = decoder(**arguments).last_hidden_state
    with dropflow.attach(llava, PRUNED) as flow:
        expected = llava.model(**inputs).last_hidden_state
        live = flow.live()
        with flow.visual(visual):
            found = decoder(**arguments).last_hidden_state
        assert torch.equal(found, expected)
        assert torch.equal(flow.live(), live)
        assert relative_error(found, plain) > 1e-2
        with pytest.raises(UnsupportedCall, match=r"LlamaModel: called directly with `inputs_embeds`.*flow\.visual"):
            decoder(**arguments)
        with flow.visual(torch.zeros_like(visual)):  # text alone
            assert torch.equal(decoder(**arguments).last_hidden_state, plain)
    assert torch.equal(decoder(**arguments).last_hidden_state, plain)


@torch.no_grad()
def test_the_decoder_called_by_itself_with_token_ids(llava: Any) -> None:
    text, inputs = prompt(((6,), (3,))), prompt()
    decoder = llava.model.language_model
    text.pop("pixel_values", None)
    plain = decoder(**text).last_hidden_state
    with dropflow.attach(llava, PRUNED):
        assert torch.equal(decoder(**text).last_hidden_state, plain)
        with pytest.raises(MissingImage, match="pixel_values: missing, but the prompt has image placeholders"):
            decoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


@torch.no_grad()
def test_the_decoder_called_by_itself_goes_on_with_a_cache(llava: Any) -> None:
    inputs, token = prompt(((3, "I", 5),)), torch.tensor([[7]])
    with dropflow.attach(llava, PRUNED):
        cache = llava(**inputs, use_cache=True)[CACHE_ARGUMENT]
        expected = llava.model(input_ids=token, **{CACHE_ARGUMENT: cache}).last_hidden_state
        cache = llava(**inputs, use_cache=True)[CACHE_ARGUMENT]
        embeds = llava.get_input_embeddings()(token)
        found = llava.model.language_model(inputs_embeds=embeds, **{CACHE_ARGUMENT: cache}).last_hidden_state
        assert torch.equal(found, expected)


@torch.no_grad()
def test_what_is_stated_inside_holds_until_the_block_around_it_counts_again(llava: Any) -> None:
    inputs = prompt(((3, "I", 5), (2, "I", 6)))
    visual = inputs["input_ids"] == IMAGE
    arguments = {"inputs_embeds": merged_embeddings(llava, inputs), "attention_mask": inputs["attention_mask"]}
    first = visual & (torch.arange(visual.shape[1]) < 8)
    with dropflow.attach(llava, PRUNED) as flow, flow.visual(visual):
        outer = llava(**arguments).logits
        with flow.visual(first):
            inner = llava(**arguments).logits
        assert torch.equal(llava(**arguments).logits, outer)
        with pytest.raises(ValueError, match="ends the inner block"), flow.visual(first):
            raise ValueError("ends the inner block")
        assert torch.equal(llava(**arguments).logits, outer)
    assert relative_error(inner, outer) > 1e-3


@torch.no_grad()
def test_a_method_that_the_user_has_replaced_comes_back(llava: Any) -> None:
    inputs, core, calls = prompt(), llava.model, []
    own = core.get_image_features

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        return own(*args, **kwargs)

    core.get_image_features = watched
    try:
        plain = llava(**inputs).logits
        with dropflow.attach(llava, HIDROP):
            pruned = llava(**inputs).logits
            assert relative_error(pruned, plain) > 1e-3
        assert core.__dict__["get_image_features"] is watched
        assert torch.equal(llava(**inputs).logits, plain)
        assert len(calls) == 3
    finally:
        del core.get_image_features


@torch.no_grad()
def test_every_document_of_a_packed_row_asks_for_itself() -> None:
    model, documents = tiny_llava(), [prompt(((3, "I", 5),)), prompt(((2, "I", "I", 4),), seed=4)]
    lengths = [one["input_ids"].shape[1] for one in documents]
    packed = {
        "input_ids": torch.cat([one["input_ids"] for one in documents], 1),
        "pixel_values": torch.cat([one["pixel_values"] for one in documents]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "use_cache": False,
    }
    with dropflow.attach(model, PRUNED) as flow:
        found = model(**packed).logits.split(lengths, 1)
        live = flow.live().split(lengths, 2)
        for number, one in enumerate(documents):
            expected = model(**one, use_cache=False).logits
            assert torch.equal(live[number], flow.live()), "another instruction token was used"
            assert relative_error(found[number], expected) < 1e-5


@torch.no_grad()
def test_lengths_of_packed_documents_are_refused_by_name(llava: Any) -> None:
    inputs = prompt(((3, "I", 5),))
    lengths = torch.tensor([0, 25], dtype=torch.int32)
    with dropflow.attach(llava, PRUNED):
        expected = llava(**inputs).logits
        for name in ("cu_seq_lens_q", "seq_idx"):
            with pytest.raises(UnsupportedCall, match=f"{name}: states where the documents of a padding-free batch"):
                llava(**inputs, **{name: lengths})
        assert torch.equal(llava(**inputs).logits, expected)


def test_hooks_of_the_user_fire_once_per_layer() -> None:
    model, seen = tiny_llava(), []
    for number, layer in enumerate(model.model.language_model.layers):
        for part in (layer, layer.self_attn.k_proj, layer.self_attn.q_proj, layer.input_layernorm):
            part.register_forward_hook(lambda module, *_, n=number: seen.append((n, type(module).__name__)))
            part.register_forward_pre_hook(lambda module, *_, n=number: seen.append((n, type(module).__name__)))

    def once() -> list[tuple[int, str]]:
        seen.clear()
        with torch.no_grad():
            model(**prompt())
        return list(seen)

    plain = once()
    with dropflow.attach(model, HIDROP):
        assert once() == plain


def test_export_is_refused(llava: Any) -> None:
    inputs = prompt(((3, "I", 5),))
    with dropflow.attach(llava, PRUNED), pytest.raises(Exception, match=r"export the model after\s+detaching"):
        torch.export.export(llava, (), inputs, strict=False)
    with torch.no_grad():
        assert torch.isfinite(llava(**inputs).logits).all()


@torch.no_grad()
def test_a_draft_model_under_a_policy_is_told_about(llava: Any) -> None:
    draft = tiny_llava(layers=2, seed=1)
    inputs = prompt(((3, "I", 5),))
    told = pytest.raises(MissingImage, match="In assisted generation the draft model gets no images")
    with dropflow.attach(draft, policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {1: 4}})), told:
        llava.generate(**inputs, assistant_model=draft, do_sample=False, max_new_tokens=4)


@torch.no_grad()
def test_videos_that_were_encoded_before_attaching_keep_the_tokens_of_their_frames() -> None:
    family, tiny = tiny_models()["qwen2_vl"]
    model = tiny.model("sdpa")
    inputs, _ = tiny.prompt(((3, "V", 5),), side="left")
    half = policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 3}})
    grid = inputs["video_grid_thw"]
    features = model.model.get_video_features(inputs["pixel_values_videos"], grid)
    without = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
    with dropflow.attach(model, half, adapter=family) as flow:
        expected = model(**inputs).logits
        live = flow.live()
        found = model(**without, mm_encoder_outputs={"video": features}).logits
    assert int(grid[0, 0]) > 1, "every frame must have its own budget"
    assert live[-1].sum() - live[0].sum() == 3 * int(grid[0, 0]) - int(grid.prod()) // 4
    assert torch.equal(flow.live(), live)
    assert torch.equal(found, expected)

"""`encode` stages drop, merge and protect rows, on the features and inside the vision encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from tiny import CHUNKS_IMAGES, IMAGE, policy, prompt, relative_error, tiny_llava

import dropflow
from dropflow import Encode, EncodeCall, Keep, PruneCall, Stage, hookimpl
from dropflow.errors import DecisionError, PolicyError, UnsupportedCall
from dropflow.testing import MaskedOracle
from dropflow_adapters.llava import Llava

BUDGET = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


class EveryOther(Stage[Any]):
    """Drops every other row of even images, every third of odd ones."""

    boundary: ClassVar[int | None] = None

    @property
    def encode_at(self) -> tuple[int | None, ...]:
        return (self.boundary,)

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        keep = tuple(places % (2 + image % 2) == 0 for image, places in enumerate(call.places))
        return Encode(keep=keep)


class InsideEncoder(EveryOther):
    boundary = 1


class PairMean(Stage[Any]):
    """Merges rows in pairs; each mean fills the place of the second."""

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        rows = tuple(f.unflatten(0, (-1, 2)).mean(1) for f in call.features)
        return Encode(rows=rows, places=tuple(p[1::2] for p in call.places))


class ProtectFirst(Stage[Any]):
    @hookimpl
    def encode(self, call: EncodeCall) -> Encode:
        return Encode(protect=tuple(p < 3 for p in call.places))


class DropAll(Stage[Any]):
    @property
    def prune_at(self) -> tuple[int, ...]:
        return (2,)

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        return Keep(torch.zeros_like(call.valid))


@pytest.mark.parametrize("stage", [EveryOther, PairMean])
@torch.no_grad()
def test_rows_dropped_from_the_features_equal_the_masked_run(stage: type[Stage[Any]]) -> None:
    model, inputs = tiny_llava(), prompt()
    plain = model(**inputs).logits
    with dropflow.attach(model, policy(encode={"use": stage})) as flow:
        logits, live = model(**inputs).logits, flow.live()
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        modes = [{}, {"num_beams": 3}, {"prefill_chunk_size": 17} if CHUNKS_IMAGES else {}]
        tokens = [model.generate(**inputs, **(BUDGET | mode)) for mode in modes]
        again = flow.live()
        report = flow.report()
    visual = (live[0] & (inputs["input_ids"] == IMAGE)).sum(1).tolist()
    assert visual == ([8, 6 + 8, 0] if stage is EveryOther else [8, 16, 0])
    assert [f.shape for f in features] == [(16, 32)] * 3
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == IMAGE] = torch.cat(list(features))
    with MaskedOracle(model, live):
        mask = inputs["attention_mask"]
        expected = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    assert relative_error(logits[real], expected[real]) < 1e-5
    assert not torch.allclose(logits[real], plain[real], atol=1e-3)
    assert torch.equal(tokens[0], tokens[2]), "chunked prefill lost track of what was encoded"
    assert tokens[1].shape == tokens[0].shape
    assert again.shape[2] <= live.shape[2]
    assert report.entry_visual_tokens > 0


@torch.no_grad()
def test_beams_see_the_rows_of_their_own_sample() -> None:
    model = tiny_llava()
    with dropflow.attach(model, policy(encode={"use": EveryOther})) as flow:
        together = model.generate(**prompt(), **(BUDGET | {"num_beams": 2}))
        live = flow.live()
    visual = (live[0] & (prompt()["input_ids"].repeat_interleave(2, 0) == IMAGE)).sum(1).tolist()
    assert visual == [8, 8, 14, 14, 0, 0]
    with dropflow.attach(model, policy(encode={"use": EveryOther})):
        own = {"input_ids": prompt()["input_ids"][:1, -25:], "pixel_values": prompt()["pixel_values"][:1]}
        alone = model.generate(**own, **(BUDGET | {"num_beams": 2}))
    assert torch.equal(together[0, -5:], alone[0, -5:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_rows_dropped_inside_the_encoder_are_gone_for_its_later_layers(attention: str) -> None:
    model, inputs = tiny_llava(attention=attention), prompt()
    sizes: list[tuple[int, ...]] = []
    layers = model.model.vision_tower.encoder._modules["layers"]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    with dropflow.attach(model, policy(encode={"use": InsideEncoder})) as flow:
        together = model(**inputs).logits
        live = flow.live()
        assert sizes == [(3, 17, 16), *[(3, 9, 16)] * 3]
        # image 1 keeps 6 rows and is padded in the batch: alone it must give the same
        first = model.get_image_features(inputs["pixel_values"]).pooler_output[1]
        swapped = inputs["pixel_values"][[0, 1]]
        second = model.get_image_features(swapped).pooler_output[1]
    assert relative_error(first, second) < 1e-5
    assert int((first != 0).any(1).sum()) == 6
    assert (live[0] & (inputs["input_ids"] == IMAGE)).sum(1).tolist() == [8, 14, 0]
    assert torch.isfinite(together).all()
    assert "layers" not in model.model.vision_tower.encoder.__dict__


@torch.no_grad()
def test_cls_attention_equals_the_eager_map() -> None:
    model, inputs = tiny_llava(), prompt()
    seen: list[torch.Tensor] = []

    class Cls(Stage[Any]):
        needs = frozenset({"cls"})

        @property
        def vision_taps(self) -> tuple[int, ...]:
            return (2,)

        @hookimpl
        def encode(self, call: EncodeCall) -> None:
            seen.extend(call.cls_attention(2))

    with dropflow.attach(model, policy(look={"use": Cls})):
        model(**inputs)
    eager = tiny_llava(attention="eager").model.vision_tower
    maps = eager(inputs["pixel_values"], output_attentions=True).attentions[2]
    for image, row in enumerate(seen):
        assert relative_error(row, maps[image, :, 0, 1:].mean(0)) < 1e-5
    siglip = tiny_llava(tower="siglip")
    with pytest.raises(PolicyError, match=r"stages\.look: needs cls"):
        dropflow.attach(siglip, policy(look={"use": Cls}))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_stages_on_the_features_see_what_the_projector_would_get(tower: str) -> None:
    model, inputs = tiny_llava(tower=tower), prompt()
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[3]
    plain, prefix = model.get_image_features(inputs["pixel_values"]).pooler_output, int(tower == "clip")
    seen: list[EncodeCall] = []

    class OnFeatures(EveryOther):
        vision_taps = (-1,)

        @property
        def encode_at(self) -> tuple[str]:  # type: ignore[override]
            return ("features",)

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            seen.append(call)
            return super().encode(call)

    with dropflow.attach(model, policy(drop={"use": InsideEncoder}, on={"use": OnFeatures})):
        model.get_image_features(inputs["pixel_values"])
    assert [len(f) for f in seen[0].features] == [8, 6, 8]
    with dropflow.attach(model, policy(on={"use": OnFeatures})):
        output = model.get_image_features(inputs["pixel_values"])
        queries, keys = seen[1].query_keys(-1)[1]
    assert torch.equal(torch.stack(seen[1].features), hidden[:, prefix:])
    assert torch.equal(seen[1].prefix_rows, hidden[:, :prefix])
    attention = model.model.vision_tower.encoder.layers[3].self_attn
    normed = model.model.vision_tower.encoder.layers[3].layer_norm1(hidden[1])
    own = [*range(prefix), *range(prefix, 16 + prefix, 3)]  # asked after the decision: of the rows that are left
    for got, projection in ((queries, attention.q_proj), (keys, attention.k_proj)):
        assert relative_error(got, projection(normed).unflatten(1, (2, -1)).transpose(0, 1)[:, own]) < 1e-5
    for image, rows in enumerate(output.pooler_output):
        kept = torch.arange(0, 16, 2 + image % 2)
        assert relative_error(rows[kept], plain[image][kept]) < 1e-5
        assert int((rows != 0).any(1).sum()) == len(kept)


def test_places_that_a_backbone_does_not_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    vision = replace(Llava(model).vision, projector=None, sublayers=None)
    monkeypatch.setattr(Llava, "vision", vision)
    for place, message in (
        ("features", r"stages\.s: works on what the projector gets, which this adapter does not name"),
        (1.5, r"stages\.s: works between attention and feed-forward part of a layer, which this adapter does not name"),
        (1.25, r"stages\.s: works at boundary 1\.25 of the vision encoder, expected 0 to 2"),
    ):

        class Somewhere(EveryOther):
            boundary = place  # type: ignore[assignment]

        with pytest.raises(PolicyError, match=message):
            dropflow.attach(model, policy(s={"use": Somewhere}))


@torch.no_grad()
def test_protected_rows_outlive_every_later_stage() -> None:
    model, inputs = tiny_llava(), prompt()
    which = policy(key={"use": ProtectFirst}, encode={"use": EveryOther}, drop={"use": DropAll})
    with dropflow.attach(model, which) as flow:
        model(**inputs)
        live = flow.live() & (inputs["input_ids"] == IMAGE)
    assert live[0].sum(1).tolist() == [9, 8 + 9, 0]  # places 0..2 stay beside those EveryOther keeps
    assert live[-1].sum(1).tolist() == [3, 6, 0]


@torch.no_grad()
def test_features_made_without_the_stage_are_refused(llava: Any) -> None:
    inputs = prompt()
    features = {"image": llava.get_image_features(inputs.pop("pixel_values"))}
    with dropflow.attach(llava, policy(encode={"use": EveryOther})) as flow:
        with pytest.raises(UnsupportedCall, match="mm_encoder_outputs: encoded without the policy"):
            llava(**inputs, mm_encoder_outputs=features)
        embeds = llava.get_input_embeddings()(inputs["input_ids"])
        merged = pytest.raises(UnsupportedCall, match=r"stages\.encode: encodes images, but the features")
        with flow.visual(inputs["input_ids"] == IMAGE), merged:
            llava(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        own = {"image": llava.get_image_features(prompt()["pixel_values"])}
        logits = llava(**inputs, mm_encoder_outputs=own).logits
        assert flow.report().entry_visual_tokens == pytest.approx((8 + 14) / 3)
        assert torch.equal(llava(**prompt()).logits, logits)


def test_a_wrong_decision_is_refused_and_the_model_still_works(llava: Any) -> None:
    class Wrong(Stage[Any]):
        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            return Encode(
                keep=tuple(f[:, 0] > 0 for f in call.features[:1]) + tuple(p[:3] > 0 for p in call.places[1:])
            )

    inputs = prompt()
    with torch.no_grad():
        plain = llava(**inputs).logits
        with dropflow.attach(llava, policy(bad={"use": Wrong})):
            with pytest.raises(
                DecisionError, match=r"stages\.bad: `encode` returned a mask of torch\.bool \(3,\) for image 1"
            ):
                llava(**inputs)
            assert torch.equal(llava(**prompt(((4,),))).logits, llava(**prompt(((4,),))).logits)
        assert torch.equal(llava(**inputs).logits, plain)

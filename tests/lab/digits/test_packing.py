"""A packed row gives the losses of the stock model on the unpacked prompts."""

import numpy as np
import pytest
import torch
from PIL import Image

from dropflow_lab.digits.checkpoints.model import build_model, build_processor
from dropflow_lab.digits.data.mix import MIX
from dropflow_lab.digits.data.questions import KINDS, ask_all
from dropflow_lab.digits.data.scenes import draw_scene, render
from dropflow_lab.digits.training.attention import use_fast_attention
from dropflow_lab.digits.training.packing import answerable, draw_batch, draw_questions, pack
from dropflow_lab.digits.training.subsets import WAYS, draw_subset
from dropflow_lab.digits.training.train_language import packed_losses


@pytest.fixture(scope="module")
def model():
    return build_model(3, decoder_layers=2).eval()


def _visual(model, batch):
    return torch.stack(list(model.model.get_image_features(batch.pixels).pooler_output))


@torch.no_grad()
def test_packed_losses_equal_stock_losses(model):
    scenes = [draw_scene("train", seed) for seed in range(3)]
    rng = np.random.default_rng(0)
    asked = [draw_questions(scene, 60, rng) for scene in scenes]
    batch = pack(scenes, asked)
    processor = build_processor()
    expected = []
    for scene, questions in zip(scenes, asked, strict=True):
        for question in questions:
            messages = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
                {"role": "assistant", "content": question.answer},
            ]
            text = processor.apply_chat_template(messages)
            inputs = processor(images=Image.fromarray(render(scene)[0]), text=text, return_tensors="pt")
            length = len(question.answer.split()) + 1
            ids = inputs["input_ids"]
            logits = model(**inputs).logits[0, -length - 1 : -1]
            expected.append(torch.nn.functional.cross_entropy(logits, ids[0, -length:], reduction="none"))
    plain, _ = packed_losses(model, batch, _visual(model, batch))
    torch.testing.assert_close(plain, torch.cat(expected), atol=2e-5, rtol=2e-5)
    with use_fast_attention(model):
        fast, _ = packed_losses(model, batch, _visual(model, batch))
    torch.testing.assert_close(fast, torch.cat(expected), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_questions_of_a_row_do_not_see_each_other(model):
    scene = draw_scene("train", 8)
    questions = [questions[0] for questions in ask_all(scene).values() if questions]
    together = pack([scene], [questions])
    losses, right = packed_losses(model, together, _visual(model, together))
    apart = [pack([scene], [[question]]) for question in questions]
    single = [packed_losses(model, batch, _visual(model, batch)) for batch in apart]
    torch.testing.assert_close(losses, torch.cat([loss for loss, _ in single]), atol=2e-5, rtol=2e-5)
    assert right[0].tolist() == [bool(hit) for _, hit in single]


@torch.no_grad()
def test_keeping_all_tokens_in_order_changes_nothing(model):
    batch = draw_batch("train", (0, 1), 2, room=40)
    visual, everything = _visual(model, batch), torch.arange(144).expand(2, -1)
    full, _ = packed_losses(model, batch, visual)
    for compact in (False, True):
        kept, _ = packed_losses(model, batch, visual, everything, compact=compact)
        torch.testing.assert_close(full, kept)


def test_pixels_are_those_of_the_processor():
    scene = draw_scene("test", 1)
    batch = pack([scene], [ask_all(scene)["pos"]])
    images = build_processor().image_processor(Image.fromarray(render(scene)[0]), return_tensors="pt")
    torch.testing.assert_close(batch.pixels, images["pixel_values"], atol=1e-5, rtol=1e-5)


def test_batches_repeat_and_fill_their_room():
    first, second = draw_batch("train", (0, 2, 9), 4), draw_batch("train", (0, 2, 9), 4)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.pixels, second.pixels)
    assert first.tokens.shape == (4, 141)
    assert not torch.equal(first.tokens, draw_batch("train", (0, 2, 10), 4).tokens)


def test_mix_binds_color_and_digit_in_two_fifths():
    assert set(MIX) == set(KINDS)
    assert sum(MIX.values()) == pytest.approx(1)
    assert MIX["c2d"] + MIX["d2c"] >= 0.35


@pytest.mark.parametrize("way", WAYS)
def test_subsets_are_ascending_and_of_the_size_asked_for(way):
    batch = draw_batch("train", (0, 3), 5, room=30)
    kept = draw_subset(batch.owner, 40, way, np.random.default_rng(0))
    assert kept.shape == (5, 40)
    assert bool((kept.diff(dim=1) > 0).all())
    taken = (batch.owner.gather(1, kept) >= 0).sum(1)
    on_digits = (batch.owner >= 0).sum(1)
    if way == "digits-first":
        assert torch.equal(taken, on_digits.clamp(max=40))
    else:
        assert bool((taken < on_digits).all())


def test_questions_without_their_digits_are_not_answerable():
    scene = draw_scene("train", 2)
    questions = [question for questions in ask_all(scene).values() for question in questions]
    batch = pack([scene], [questions])
    kept = torch.from_numpy(np.flatnonzero(batch.owner[0].numpy() != 0))[None]
    known = answerable(batch, kept)[0].tolist()
    assert known == [0 not in question.evidence for question in questions]
    assert answerable(batch, torch.arange(144)[None]).all()

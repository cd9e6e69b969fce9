"""`reference: true` of SparseVLM against the released algorithm, written out over the layers of an eager model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import IMAGE, policy, prompt, relative_error, tiny_llava
from torch import Tensor

import dropflow
from dropflow.errors import PolicyError

GUIDED = {"use": "sparsevlm/text-guided", "keep": {2: 7, 4: 4}, "recycle_share": 0.8, "cluster_size": 3}
RELEASED = policy(sparse=GUIDED | {"reference": True}) | {"positions": "compact"}
Cut = Callable[[int, Tensor, Tensor, Tensor, slice], tuple[Tensor, Tensor]]
"""Boundary, states, attention of the layer before, position ids and visual rows -> new visual states, kept rows."""


def layer_by_layer(model: Any, inputs: dict[str, Any], keeps: dict[int, int], cut: Cut, *, compact: bool) -> Tensor:
    """Logits of the last token of one sample with one image, by the layers of an eager model and nothing of ours."""
    text = model.get_decoder()
    hidden = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    hidden[0, visual] = features[0]
    start, images = int(visual[0]), len(visual)
    embeds, positions = hidden, torch.arange(hidden.shape[1])
    weights = torch.empty(0)
    for number, layer in enumerate(text.layers):
        if number in keeps:
            rows = slice(start, start + images)
            own, kept = cut(number, hidden[0], raters_of(embeds[0], start, visual, weights), positions, rows)
            hidden = torch.cat((hidden[:, :start], own[None], hidden[:, start + images :]), 1)
            gaps = torch.cat((positions[:start], positions[rows][kept], positions[start + images :]))
            positions, images = torch.arange(hidden.shape[1]) if compact else gaps, len(own)
        tokens = hidden.shape[1]
        rotary = text.rotary_emb(hidden, positions[None])
        future = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
        _, weights = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=future)
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=future)
    return model.lm_head(text.norm(hidden))[0, -1]


def raters_of(embeds: Tensor, start: int, visual: Tensor, weights: Tensor) -> Tensor:
    """(heads, raters, keys): attention of the text rows that have more than average to do with the image."""
    words = embeds[start + len(visual) :]
    relevance = torch.softmax(embeds[visual] @ words.T, -1).mean(0)
    return weights[0, :, weights.shape[2] - len(words) :][:, relevance > relevance.mean()]


def guided(number: int, hidden: Tensor, attention: Tensor, _: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Version 1.5: the best stay in order, and the means of the clusters of the next best follow them."""
    scores, states = attention.mean((0, 1))[rows], hidden[rows]
    count = min(GUIDED["keep"][number], len(states) - 1)
    kept = sorted(scores.topk(count).indices.tolist())
    dropped = sorted(set(range(len(states))) - set(kept), key=lambda token: -float(scores[token]))
    some = dropped[: int(GUIDED["recycle_share"] * len(dropped)) + 1]
    merged = cluster_and_merge(states[some], int(len(some) / GUIDED["cluster_size"]) + 1)
    # positions are compact, so that which rows were kept is asked by nobody
    return torch.cat((states[kept], merged)), torch.tensor(kept)


def cluster_and_merge(states: Tensor, count: int) -> Tensor:
    """Density peaks as released, without the random numbers: means, in the order of their centres."""
    away = [[math.dist(a, b) / states.shape[1] ** 0.5 for b in states.tolist()] for a in states.tolist()]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in away]
    apart = []
    for i, row in enumerate(away):
        higher = [row[j] for j in range(len(row)) if density[j] > density[i]]
        apart.append(min(higher) if higher else max(map(max, away)))
    centres = sorted(range(len(away)), key=lambda i: -density[i] * apart[i])[:count]
    nearest = [min(range(count), key=lambda c, row=row: row[centres[c]]) for row in away]
    for place, centre in enumerate(centres):
        nearest[centre] = place
    sums = torch.zeros(count, states.shape[1]).index_add(0, torch.tensor(nearest), states)
    return sums / (torch.tensor(nearest).bincount(minlength=count) + 1e-6)[:, None]


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_clusters_follow_the_survivors_as_released(seed: int) -> None:
    inputs = prompt([(3, "I", 6)], seed=seed)
    expected = layer_by_layer(tiny_llava(attention="eager"), inputs, GUIDED["keep"], guided, compact=True)
    model = tiny_llava()
    with dropflow.attach(model, RELEASED) as flow:
        logits = model(**inputs).logits[0, -1]
        assert [layer.visual_tokens for layer in flow.report().layers] == list(flow.plan.schedule().per_layer)
    with dropflow.attach(model, policy(sparse=GUIDED) | {"positions": "compact"}):
        at_centres = model(**inputs).logits[0, -1]
    assert relative_error(logits, expected) < 1e-4
    assert relative_error(at_centres, expected) > 1e-3, "where clusters stand makes no difference here"


@torch.no_grad()
def test_generated_tokens_follow_from_the_released_order_alone_and_in_a_batch() -> None:
    model, samples = tiny_llava(), [(3, "I", 6), (2, "I", 9)]
    inputs = prompt(samples)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with dropflow.attach(model, RELEASED):
        together = model.generate(**inputs, **options)
        for sample in range(2):
            own = inputs["attention_mask"][sample].bool()
            pixels = inputs["pixel_values"][sample][None]
            alone = model.generate(input_ids=inputs["input_ids"][sample, own][None], pixel_values=pixels, **options)
            assert torch.equal(alone.sequences[0, -4:], together.sequences[sample, -4:])
            for ours, theirs in zip(together.logits, alone.logits, strict=True):
                assert relative_error(ours[sample], theirs[0]) < 1e-5


@torch.no_grad()
def test_places_hold_the_survivors_in_their_order_and_the_clusters_after_them() -> None:
    model, inputs = tiny_llava(), prompt([("I", 2, "I", 6)])
    visual = inputs["input_ids"][0] == IMAGE
    with dropflow.attach(model, RELEASED) as flow:
        model(**inputs)
        released, live = flow.merges()[2][0], flow.live()[2][0]
    with dropflow.attach(model, policy(sparse=GUIDED) | {"positions": "compact"}) as flow:
        model(**inputs)
        centred = flow.merges()[2][0]
        assert torch.equal(flow.live()[2][0], live), "the same places are left"
    for image in visual.nonzero()[:, 0].split(16):
        places = image[live[image]].tolist()
        whence = {place: [token for token in image.tolist() if int(released[token]) == place] for place in places}
        survivors = [whence[place] for place in places[:7]]
        assert [len(tokens) for tokens in survivors] == [1] * 7
        assert survivors == sorted(survivors), "survivors keep their order"
        at_centres = [{t for t in image.tolist() if int(centred[t]) == place} for place in places]
        assert all(set(whence[place]) in at_centres for place in places[7:]), "clusters have the same members"


def test_the_released_order_needs_compact_positions() -> None:
    reference = GUIDED | {"reference": True}
    with pytest.raises(PolicyError, match=r"stages\.sparse\.reference: .* set `positions: compact`"):
        dropflow.attach(tiny_llava(), policy(sparse=reference))
    with dropflow.attach(tiny_llava(), policy(sparse=reference | {"recycle": False})):
        pass

"""The cos and sin that a stage is shown turn q and k as the family's own code does, where the adapter says so."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from unseen import UNSEEN

from dropflow import Keep, PruneCall, Stage, hookimpl
from dropflow.testing import tiny_models
from dropflow.testing.case import Case
from dropflow.testing.probes import policy
from dropflow_adapters.auto import Auto
from dropflow_sparsevlm.gravity import gravity

FAMILIES = tiny_models() | {f"auto:{n}": (Auto, t) for n, t in UNSEEN.items()}
HYBRID = {"aya_vision", "llama4", "auto:cohere2_vision", "auto:exaone4_5"}
"""Decoders of which one kind of layer has no positions at all."""


class Turns(Stage[Any]):
    """Computes W for all slots in the layer before either boundary, and drops tokens in between."""

    prune_at = (2, 4)
    taps = (1, 3)

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.found: dict[int, Tensor] = {}

    @hookimpl
    def prune(self, call: PruneCall) -> Keep:
        layer, rows = call.boundary - 1, torch.arange(call.index.shape[1]).expand(len(call.index), -1)
        self.found[layer] = gravity(*call.rotary(layer), rows, call.tapped(layer).query.shape[-1])
        return Keep((call.image_id < 0) | (call.index % 3 > 0))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_all_ones_vectors_turn_as_in_the_familys_own_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name, *FAMILIES[name], {})
    backbone = case.adapter(case.model)
    assert ("rotary" in backbone.facts()) == (name not in HYBRID)
    if name in HYBRID:
        return
    module = sys.modules[type(backbone.text).__module__]
    turn, expected = module.apply_rotary_pos_emb, []

    halves: list[Tensor] = []
    inside: list[bool] = []
    backbone.text.register_forward_pre_hook(lambda *_: inside.append(True))
    own = inspect.signature(turn)
    apart = "k" not in own.parameters  # Gemma 3n and 4 turn q, then k, each (batch, tokens, heads, dim)

    def seen(*given: Any, **more: Any) -> Any:
        given = own.bind(*given, **more).args
        q = given[0]
        if not inside or len(expected) > max(Turns.taps):
            return turn(*given)
        if apart:
            halves.append(turn(torch.ones_like(q), *given[1:])[:, :, 0])
            if len(halves) % 2 == 0:
                expected.append((halves[-2] @ halves[-1].mT, q.shape[-1]))
        else:
            ones = turn(torch.ones_like(q), torch.ones_like(given[1]), *given[2:])
            expected.append((ones[0][:, 0] @ ones[1][:, 0].mT, q.shape[-1]))
        return turn(*given)

    positions = "compact" if backbone.linear_positions else "persistent"
    with case.attach(policy(turns={"use": Turns}) | {"positions": positions}) as flow:
        monkeypatch.setattr(module, "apply_rotary_pos_emb", seen)
        case.model(**case.inputs)
    ((_, stage),) = flow.plan.stages
    for layer in Turns.taps:
        product, turning = expected[backbone.shape.with_attention.index(layer)]
        head_dim = turning if apart else backbone.decoder_widths.head_dim  # Gemma 4 turns whole heads of different size
        w = (product + head_dim - turning) / head_dim**0.5
        assert torch.allclose(stage.found[layer], w.expand_as(stage.found[layer]), atol=1e-4), layer
    assert stage.found[3].shape[1] < stage.found[1].shape[1], "nothing was dropped between the two"

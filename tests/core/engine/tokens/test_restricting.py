"""Arguments of a decoder layer are restricted by name."""

from __future__ import annotations

import pytest
import torch

from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.restricting import check_arguments, check_parameters, restrict
from dropflow.errors import UnsupportedCall, UnsupportedModel

LIVE = LiveSet.of(torch.tensor([[True, False, True, True], [False, False, False, True]]))


def test_arguments_are_restricted_on_their_token_dimension() -> None:
    ids = restrict("position_ids", torch.arange(4)[None], LIVE, {})
    assert ids[0].tolist() == [0, 2, 3]
    assert ids[1, -1] == 3
    rope = torch.arange(4.0)[None, :, None].expand(1, 4, 2)
    cos, sin = restrict("position_embeddings", (rope, -rope), LIVE, {})
    assert cos.shape == (2, 3, 2)
    assert cos[0, :, 0].tolist() == [0, 2, 3]
    assert sin[1, 2].tolist() == [-3, -3]
    assert restrict("position_ids", torch.arange(4).expand(3, 2, 4), LIVE, {}).shape == (3, 2, 3)
    complex_rope = torch.polar(torch.ones(2, 4, 2), torch.ones(2, 4, 2))
    assert restrict("position_embeddings", complex_rope, LIVE, {}).shape == (2, 3, 2)
    assert restrict("position_ids", None, LIVE, {}) is None
    one = LiveSet.of(torch.tensor([[True, False, True, True]]))
    assert restrict("position_embeddings", rope, one, {})[0, :, 0].tolist() == [0, 2, 3]
    assert restrict("kinds", torch.arange(4)[None], LIVE, {"kinds": -1})[0].tolist() == [0, 2, 3]


def test_what_is_not_known_by_name_is_refused_whatever_its_shape() -> None:
    known = {"hidden_states": torch.ones(2, 4, 3), "use_cache": True, "num_items_in_batch": torch.tensor(3)}
    check_arguments(known | {"position_ids": torch.ones(2, 4)}, LIVE, {})
    with pytest.raises(UnsupportedCall, match=r"router: .*tensors of shape \(4, 4\).*`Backbone.token_arguments`"):
        check_arguments(known | {"router": torch.ones(4, 4)}, LIVE, {})
    check_arguments(known | {"router": torch.ones(4, 4)}, LIVE, {"router": -1})
    with pytest.raises(UnsupportedCall, match=r"router: of shape \(4, 5\), expected 4 tokens in dimension -1"):
        check_arguments(known | {"router": torch.ones(4, 5)}, LIVE, {"router": -1})
    with pytest.raises(UnsupportedCall, match="cu_seq_lens_q: states where the documents of a padding-free batch"):
        check_arguments(known | {"cu_seq_lens_q": torch.tensor([0, 4])}, LIVE, {})


def test_parameters_of_a_layer_are_looked_at_before_anything_runs() -> None:
    known = {"hidden_states": "torch.Tensor", "position_ids": "Any", "kwargs": ""}
    check_parameters("Layer", known | {"states": "Cache | None"}, ())
    check_parameters("Layer", known | {"cache": ""}, ())
    with pytest.raises(UnsupportedModel, match=r"Layer.forward: takes shared_states, which dropflow does not know"):
        check_parameters("Layer", known | {"shared_states": "dict"}, ())
    check_parameters("Layer", known | {"shared_states": "dict"}, {"shared_states"})
    with pytest.raises(UnsupportedModel, match=r"several caches \(cache, states\), expected one"):
        check_parameters("Layer", known | {"cache": "", "states": "Cache | None"}, ())
    with pytest.raises(UnsupportedModel, match="takes no cache"):
        check_parameters("Layer", {"hidden_states": ""}, ())

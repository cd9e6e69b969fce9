"""The kit detects adapters that state a packed vision tower wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from dropflow import PackedTables, PackedTower
from dropflow.testing import BrokenGuarantee, assert_backbone_conforms, tiny_models
from dropflow.testing.case import Case
from dropflow.testing.probes import UNITS
from dropflow.testing.units import check_units
from dropflow_adapters.qwen2_5_vl import Qwen25VL
from dropflow_adapters.qwen2_vl import Qwen2VL
from dropflow_adapters.qwen3_vl import Qwen3VL


class WithoutWindows(Qwen2VL):
    """Qwen2.5-VL without its windows: the tower makes those of the whole picture."""


class WrongOrder(Qwen25VL):
    def tables(self, arguments: Mapping[str, Any]) -> PackedTables:
        found = super().tables(arguments)
        assert found.order is not None
        return replace(found, order=(found.order[0], found.order[1].flip(0)))


class OneSegment(Qwen2VL):
    def tables(self, arguments: Mapping[str, Any]) -> PackedTables:
        found = super().tables(arguments)
        return replace(found, borders={name: table[[0, -1]] for name, table in found.borders.items()})


class WithoutInterpolation(Qwen3VL):
    def tables(self, arguments: Mapping[str, Any]) -> PackedTables:
        found = super().tables(arguments)
        return replace(found, rows={"position_ids": found.rows["position_ids"]})


class ShrunkenGrid(Qwen3VL):
    def tables(self, arguments: Mapping[str, Any]) -> PackedTables:
        found = super().tables(arguments)
        return replace(found, rows={**found.rows, "position_ids": torch.zeros_like(found.rows["position_ids"])})


class WithoutDeepstackMergers(Qwen3VL):
    @property
    def packed_tower(self) -> PackedTower:
        tower = super().packed_tower
        return replace(tower, mergers=tower.mergers[:1])


@pytest.mark.parametrize(
    ("wrong", "name", "message"),
    [
        (WithoutWindows, "qwen2_5_vl", r"cannot run on some image units: .*`packed_tower` of the adapter WithoutWin"),
        (
            WrongOrder,
            "qwen2_5_vl",
            r"the features of the image units that stay differ .* by \d.*the adapter WrongOrder",
        ),
        (OneSegment, "qwen2_vl", r"the features of the image units that stay differ .* by \d.*the adapter OneSegment"),
        (WithoutInterpolation, "qwen3_vl", r"cannot run on some image units: .*the adapter WithoutInterpolation"),
        (ShrunkenGrid, "qwen3_vl", r"the features of the image units that stay differ .*the adapter ShrunkenGrid"),
        (WithoutDeepstackMergers, "qwen3_vl", r"returned \d+ rows for \d+ units; correct the adapter's `packed_tower`"),
    ],
)
def test_a_wrong_tower_is_found(wrong: type[Qwen2VL], name: str, message: str) -> None:
    tiny = tiny_models()[name][1]
    with pytest.raises(BrokenGuarantee, match=message):
        check_units(Case(name, wrong, tiny, UNITS))


def test_the_whole_kit_runs_it() -> None:
    with pytest.raises(BrokenGuarantee, match=r"OneSegment \(units\): guarantee 2 .*the adapter OneSegment"):
        assert_backbone_conforms(OneSegment, tiny_models()["qwen2_vl"][1])

"""What a decoder layer that shares the keys of another one sees of that layer's cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dropflow.engine.tokens.cache_index import KeyIndex
from dropflow.engine.tokens.cache_layers import FlowLayer, UniformLayer

if TYPE_CHECKING:
    from dropflow.units import BackboneShape


@dataclass(frozen=True, eq=False)
class FlowShared:
    """The entries of a cache layer as another decoder layer sees them, as they were before a call.

    That decoder layer has no cache of its own. When it runs, the layer that makes its keys has already written those of
    the call.
    """

    layer: FlowLayer | UniformLayer
    """The cache of the layer that makes the keys."""
    index: KeyIndex | None
    """The tokens of the entries, invalid where they are not seen; `None` where no entry was held."""
    length: int
    """Number of logical tokens seen before the call."""

    @classmethod
    def before(cls, layers: Mapping[int, FlowLayer | UniformLayer], shape: BackboneShape) -> dict[int, FlowShared]:
        """By number of the decoder layer, for all layers that share keys, from the cache's `layers`."""
        found = {}
        for number, producer in shape.producers:
            layer = layers[producer]
            index = layer.seen_by(number)
            if index is None and layer.length:
                index = layer.full_index()
            found[number] = cls(layer, index, layer.length)
        return found

    def full_index(self) -> KeyIndex:
        """Index of all entries held before the call; there must be some."""
        assert self.index is not None
        return self.index.upto(int(self.length))

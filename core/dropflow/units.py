"""Numbers in a policy: layers as boundaries or shares of depth, tokens as counts or shares of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, WithJsonSchema

from dropflow.errors import PolicyError, nearest, quoted

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

LARGEST = 2**31 - 1
"""Largest number in a policy, so that what is computed from it fits the integers of every device."""


def _number(name: str, whole: str, share: str) -> tuple[BeforeValidator, WithJsonSchema]:
    """Accept an integer >= 0 or a float in (0, 1]; one message for everything else, and the schema for editors.

    `name` is what messages call such a number in a mapping, such as `{boundary: tokens}`.
    """
    expected = f"expected {whole} (an integer from 0), or {share} (a float above 0, up to 1.0)"

    def check(value: object) -> int | float:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST:
            return value
        if isinstance(value, float) and 0 < value <= 1:
            return value
        raise ValueError(expected)

    integer = {"type": "integer", "minimum": 0, "maximum": LARGEST}
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    solved = {"const": "solve", "description": "follows from the policy's `budget`"}
    schema = {"anyOf": [integer, number, solved], "title": name, "description": expected}
    return BeforeValidator(check), WithJsonSchema(schema)


Depth = Annotated[int | float, *_number("boundary", "a boundary, the layer before which it lies", "a share of depth")]
"""Boundary `i` lies before decoder layer `i` (0-based); a float is a share of the model's depth."""

Tokens = Annotated[
    int | float, *_number("tokens", "a number of visual tokens per image", "a share of the image's tokens")
]
"""Visual tokens of one image; a float is a share of the tokens that image has at entry to the LLM."""

Rounding = Literal["half_up", "floor", "half_even", "ceil", "at_least_one"]
"""How a share of an image's tokens becomes a number of tokens."""


@dataclass(frozen=True)
class BackboneShape:
    """The two numbers of a backbone that a policy is tuned for."""

    layers: int
    """Decoder layers, L."""
    visual_tokens: int | None
    """Visual tokens of one image at entry to the LLM; `None` where the number differs between images."""
    attending: tuple[int, ...] | None = None
    """Decoder layers with attention, ascending; `None` for all. The others are recurrent, or mix no tokens."""
    producers: tuple[tuple[int, int], ...] = ()
    """Pairs of a decoder layer that reads the keys of an earlier one, and that layer, which makes them."""

    @property
    def with_attention(self) -> Sequence[int]:
        """Decoder layers with attention, ascending."""
        return range(self.layers) if self.attending is None else self.attending

    def attends(self, layer: int) -> bool:
        """Whether a decoder layer has attention."""
        return self.attending is None or layer in self.attending

    def producer(self, layer: int) -> int | None:
        """The layer whose keys a decoder layer reads; `None` where it makes its own, or has none."""
        return dict(self.producers).get(layer)

    @property
    def holding(self) -> tuple[int, ...]:
        """Decoder layers that make keys, ascending: those whose caches have entries."""
        sharers = dict(self.producers)
        return tuple(layer for layer in self.with_attention if layer not in sharers)

    def ranks_by(self, layer: int) -> int | None:
        """The last layer up to `layer` with attention, whose rows stand for those of `layer`; `None` for none."""
        if self.attending is None:
            return layer
        return max((number for number in self.attending if number <= layer), default=None)


@dataclass(frozen=True)
class Budget:
    """How many visual tokens of one image stay: an absolute count, or a share of the image's tokens at entry."""

    tokens: int | None = None
    """The count, for each image; `None` where a share is given."""
    share: float | None = None
    """The share, in (0, 1]; `None` where a count is given."""
    rounding: Rounding = "half_up"
    """For shares: `half_up` keeps at least one token; `floor`, `half_even` and `ceil` are int, round and math.ceil;
    `at_least_one` is `floor`, but never 0."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for both, and for what is no number that they can be."""
        tokens, share = self.tokens, self.share
        if tokens is not None and share is not None:
            raise ValueError(f"Budget: expected either `tokens` or `share`, got {quoted(tokens)} and {quoted(share)}")
        if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0):
            raise ValueError(f"Budget: expected `tokens` as an integer from 0, got {quoted(tokens)}")
        if share is not None and (not isinstance(share, int | float) or isinstance(share, bool) or not share > 0):
            raise ValueError(f"Budget: expected `share` as a number above 0, got {quoted(share)}")
        if self.rounding not in get_args(Rounding):
            valid = nearest(str(self.rounding), get_args(Rounding))
            raise ValueError(f"Budget: no `rounding` {quoted(self.rounding)}; {valid}")

    def of(self, visual_tokens: int) -> int:
        """Number of tokens that stay in an image with `visual_tokens` tokens at entry."""
        if self.share is None:
            return min(self.tokens or 0, visual_tokens)
        exact = self.share * visual_tokens
        if self.rounding == "half_up":
            return min(max(1, math.floor(exact + 0.5)), visual_tokens)
        if self.rounding == "ceil":
            return min(math.ceil(exact), visual_tokens)
        if self.rounding == "at_least_one":
            return min(max(1, int(exact)), visual_tokens)
        return int(exact) if self.rounding == "floor" else round(exact)

    def of_each(self, visual_tokens: Int[Tensor, "images"]) -> Int[Tensor, "images"]:
        """Number of tokens that stay in each image, computed on the device, with nothing read back.

        Shares are multiplied in float64, as `of` does; for MPS, which has no float64, the host computes them.
        """
        if self.share is None:
            return visual_tokens.clamp(max=self.tokens or 0)
        if visual_tokens.device.type == "mps":
            import torch

            return torch.tensor([self.of(size) for size in visual_tokens.tolist()], device=visual_tokens.device)
        exact = self.share * visual_tokens.double()
        if self.rounding == "half_up":
            return (exact + 0.5).floor().clamp(min=1).long().minimum(visual_tokens)
        if self.rounding == "ceil":
            return exact.ceil().long().minimum(visual_tokens)
        if self.rounding == "at_least_one":
            return exact.floor().clamp(min=1).long().minimum(visual_tokens)
        return (exact.floor() if self.rounding == "floor" else exact.round()).long()


@dataclass(frozen=True)
class Scale:
    """Converts the numbers of a policy to one backbone, and refuses absolute ones tuned for another shape."""

    target: BackboneShape
    """The backbone that the policy is resolved for."""
    tuned_for: BackboneShape | None = None
    """The backbone that its absolute numbers were tuned for."""
    rescale: bool = False
    """Whether absolute numbers tuned for another shape are scaled instead of refused."""

    def boundary(self, value: int | float, path: str) -> int:
        """Boundary 0..L that `value` means on the target; raises `PolicyError` naming `path`."""
        depth = self.target.layers
        if isinstance(value, float):
            return math.floor(value * depth + 0.5)
        if value and self.tuned_for is not None and self.tuned_for.layers != depth:  # 0 scales to 0
            self._refuse_unless_rescaled(path, value, f"{self.tuned_for.layers} layers", f"{depth}")
            value = math.floor(value * depth / self.tuned_for.layers + 0.5)
        if value > depth:
            raise PolicyError(
                f"{path}: expected a boundary from 0 to {depth} (the model has {depth} layers), got {value}"
            )
        return value

    def tokens(self, value: int | float, path: str, rounding: Rounding = "half_up") -> Budget:
        """Budget per image that `value` means on the target; raises `PolicyError` naming `path`."""
        if isinstance(value, float):
            return Budget(share=value, rounding=rounding)
        tuned, target = self.tuned_for, self.target.visual_tokens
        if tuned is not None and tuned.visual_tokens is not None and tuned.visual_tokens != target:
            self._refuse_unless_rescaled(
                path,
                value,
                f"{tuned.visual_tokens} visual tokens",
                "a varying number" if target is None else f"{target}",
            )
            if target is not None:  # scaled by the whole image, even where encode stages leave less of it
                return Budget(tokens=Budget(share=value / tuned.visual_tokens).of(target) if value else 0)
            return Budget(share=value / tuned.visual_tokens) if value else Budget(tokens=0)
        return Budget(tokens=value)

    def _refuse_unless_rescaled(self, path: str, value: int, tuned: str, got: str) -> None:
        if not self.rescale:
            raise PolicyError(
                f"{path}: the absolute number {value} was tuned for {tuned}, but the model has {got}; "
                "set `rescale: true` to scale it in proportion, or write a share (a float up to 1.0)"
            )


def check_grid(where: str, grid: Any) -> None:
    """Raise `ValueError`, which names `where`, for anything but a patch grid (rows, columns)."""
    sides = tuple(grid) if isinstance(grid, Sequence) and not isinstance(grid, str) else ()
    if len(sides) != 2 or not all(isinstance(side, Integral) and int(side) >= 0 for side in sides):
        raise ValueError(f"{where}: expected a patch grid (rows, columns), such as (24, 24), got {quoted(grid)}")

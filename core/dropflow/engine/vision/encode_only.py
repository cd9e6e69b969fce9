"""The `encode` stages of a policy alone, for programs that run the model themselves, such as a server.

Such a program encodes images apart from the prompt: it reserves placeholders for an image before it runs the vision
tower, and keeps what it has encoded for other prompts. So a number of tokens has to follow from the patch grid, and
nothing but the image may matter. Neither this module nor what it imports needs transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dropflow.engine.vision.rows import Decided, Rows, raise_faults
from dropflow.errors import DecisionError, PolicyError, quoted
from dropflow.lifecycle.payloads import EncodeCall
from dropflow.lifecycle.stage import EncodeBoundary
from dropflow.policy.encode_faults import encode_faults
from dropflow.policy.plan import resolve
from dropflow.policy.policy_file import Source, load_policy
from dropflow.policy.schedule import encoded
from dropflow.units import BackboneShape, check_grid

Projector = Callable[[Float[Tensor, "rows dim"]], Float[Tensor, "rows dim"]]


@dataclass(frozen=True, eq=False)
class ReducedImage:
    """What the `encode` stages of a policy left of one image."""

    rows: Float[Tensor, "left dim"]
    """Its rows for the LLM."""
    places: Int[Tensor, "left"]
    """Which of the image's patches each row stands for (0-based, ascending, row by row of the grid)."""


class EncodeOnly:
    """A policy whose stages reduce what a vision tower gave, and do nothing else."""

    def __init__(
        self,
        source: Source,
        shape: BackboneShape,
        facts: frozenset[str] = frozenset(),
        *,
        overrides: Sequence[str] = (),
        host: str = "this program",
    ) -> None:
        """Read a policy as `load_policy` does, for a backbone of `shape` that states `facts` (keys of `FACTS`).

        Raises `PolicyError` with every reason why the program called `host` cannot run it: stages that work in the
        LLM or inside the vision tower, that read its attention or the text, or whose number of tokens depends on what
        an image shows.
        """
        if not isinstance(shape, BackboneShape):
            raise ValueError(f"shape: expected the model's BackboneShape, got {quoted(shape)}")
        if not isinstance(facts, Set):
            raise ValueError(f"facts: expected a set of facts, such as frozenset({{'grid'}}), got {quoted(facts)}")
        self._plan, self._host = resolve(load_policy(source, overrides), shape, facts), host
        self.policy = self._plan.policy
        """The policy, with every number that was marked `solve`."""
        faults = encode_faults(self._plan, facts, host)
        if faults:
            raise PolicyError("\n".join(faults))

    @property
    def identity(self) -> str:
        """A hexadecimal digest of the policy and the shape, for the keys of caches of encoded images."""
        told = {"policy": self.policy.to_dict(), "shape": asdict(self._plan.shape)}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def tokens(self, grid: tuple[int, int]) -> int:
        """Visual tokens that an image with this patch grid (rows, columns) has in the prompt."""
        check_grid("grid", grid)
        count = encoded(grid[0] * grid[1], self._plan.encodes, grid)[0]
        assert count is not None  # such policies are refused
        return count

    @torch.no_grad()
    def reduce(
        self,
        features: Sequence[Float[Tensor, "rows dim"]],
        grids: Sequence[tuple[int, int]],
        project: Projector | None = None,
        prefix: int = 0,
    ) -> list[ReducedImage]:
        """Reduce images, whose `features` hold a row for every patch of their `grids`, row by row.

        With `project`, features are those that the projector gets, and it is called on the rows of all images that are
        left for it. `prefix` is the number of rows that the tower held before the patches. Raises `DecisionError` for
        an answer that does not fit, and where more or fewer rows are left than `tokens` says.
        """
        _check_images(features, grids)
        rows = [Rows.whole(len(own), own) for own in features]
        present = list(features)
        if project is not None:
            present = self._decided("features", present, rows, grids, prefix)
            present = list(torch.split(project(torch.cat(present)), [len(own) for own in present])) if present else []
        present = self._decided(None, present, rows, grids, prefix)
        for image, (own, grid) in enumerate(zip(present, grids, strict=True)):
            if len(own) != self.tokens(grid):
                raise DecisionError(
                    f"policy {self.policy.name!r}: {len(own)} tokens are left of image {image}, but {self._host} has "
                    f"counted {self.tokens(grid)} placeholders; correct the forecast of its stages"
                )
        return [ReducedImage(own, left.places) for own, left in zip(present, rows, strict=True)]

    def _decided(
        self,
        boundary: EncodeBoundary,
        features: list[Tensor],
        rows: list[Rows],
        grids: Sequence[tuple[int, int]],
        prefix: int,
    ) -> list[Tensor]:
        """The features after the stages at a boundary, each of which sees what the one before left; renews `rows`."""
        faults: list[Any] = []
        for name, stage in self._plan.encode_at.get(boundary, ()) if features else ():
            call = EncodeCall(
                boundary=boundary,
                features=tuple(features),
                prefix_rows=features[0].new_zeros(len(features), 0, features[0].shape[-1]),
                places=tuple(own.places for own in rows),
                sizes=tuple(own.sizes for own in rows),
                grids=tuple(grids),
                prefix=prefix,
                has_cls=False,
                tower=self._unseen,
                members=self._unseen,
            )
            answer = self._plan.hooks.encode(call, stage)
            if answer is not None:
                decided = Decided(answer, f"stages.{name}", self._plan.carries[name])
                features, rows[:] = decided.apply(features, rows)
                faults += decided.faults
        raise_faults(faults)
        return features

    def _unseen(self, layer: int) -> Any:
        raise DecisionError(
            f"vision layer {layer}: {self._host} does not give away what its vision tower computed; list the layer in "
            "the stage's `vision_taps`, so that it is refused before"
        )


def _check_images(features: Any, grids: Any) -> None:
    """Raise `ValueError` for anything but one tensor (rows, dim) and one patch grid for each image."""
    if not isinstance(features, Sequence) or not all(isinstance(own, Tensor) and own.dim() == 2 for own in features):
        raise ValueError(f"features: expected a tensor (rows, dim) for each image, got {quoted(features)}")
    if not isinstance(grids, Sequence) or len(grids) != len(features):
        raise ValueError(f"grids: expected one for each of {len(features)} images, got {quoted(grids)}")
    for image, (own, grid) in enumerate(zip(features, grids, strict=True)):
        check_grid(f"grids[{image}]", grid)
        if len(own) != grid[0] * grid[1]:
            raise ValueError(
                f"grids[{image}]: {grid[0]} x {grid[1]} patches, but its features have {len(own)} rows; pass a row for "
                "every patch"
            )

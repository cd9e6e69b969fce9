"""Which visual tokens a prompt kept, sample by sample, and a later forward that keeps the very same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.engine.decoder.record import PromptRecord
from dropflow.engine.tokens.live_set import LiveSet
from dropflow.engine.tokens.prompt import Prompt
from dropflow.errors import UnsupportedCall, quoted


@dataclass(frozen=True)
class Keeps:
    """What one sample's prompt kept. Places number the sample's tokens from 0, without padding."""

    layers: int
    """Decoder layers of the model."""
    entry: int
    """Boundary at which vision entered."""
    visual: tuple[int, ...]
    """Places of the visual tokens, ascending."""
    until: tuple[int, ...]
    """For each of them, the boundary from which it was not live; at most `entry` if no layer ran on it."""
    merges: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """Boundary -> pairs of places: a token whose state was merged before that layer, and the one that took it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it, also in another process."""
        return asdict(self) | {"merges": {str(boundary): list(map(list, own)) for boundary, own in self.merges.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Keeps:
        """The keeps that `to_dict` has written; raises `UnsupportedCall` for other data."""
        if not isinstance(data, Mapping):
            raise UnsupportedCall(f"keeps: expected what `Keeps.to_dict` returns, got {quoted(data)}")
        try:
            merges = {int(b): tuple((int(a), int(c)) for a, c in own) for b, own in data["merges"].items()}
            visual, until = (tuple(map(int, data[name])) for name in ("visual", "until"))
            found = cls(int(data["layers"]), int(data["entry"]), visual, until, merges)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnsupportedCall(f"keeps: expected what `Keeps.to_dict` returns, got {error!r}") from error
        if len(visual) != len(until) or not all(0 <= boundary <= found.layers for boundary in (found.entry, *until)):
            raise UnsupportedCall("keeps: expected one boundary of the model for each visual token; write them anew")
        return found


def keeps_of(record: PromptRecord) -> tuple[Keeps, ...]:
    """The keeps of every sample of a recorded prompt."""
    depth, live = record.plan.shape.layers, record.live()
    valid = torch.cat([part.valid[:, : part.tokens] for part in record.parts], 1)
    visual = torch.cat([part.visual for part in record.parts], 1)
    number = torch.arange(1, depth + 1, device=live.device)[:, None, None]
    until = (live * number).amax(0)
    seen = (live & visual).flatten(1).any(1).tolist()
    entry = seen.index(True) if True in seen else 0
    until = torch.where(until > 0, until, entry)
    merges = record.merges()
    found = []
    for sample, (real, own) in enumerate(zip(valid, visual, strict=True)):
        place = real.long().cumsum(0) - 1
        moved = {}
        for boundary, into in merges.items():
            away = (into[sample] != torch.arange(len(real), device=into.device)) & real
            pairs = torch.stack((place[away], place[into[sample][away]]), 1).tolist()
            if pairs:
                moved[boundary] = tuple((a, b) for a, b in pairs)
        found.append(Keeps(depth, entry, tuple(place[own].tolist()), tuple(until[sample, own].tolist()), moved))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Replayed:
    """The keeps of all samples of a call, by logical index."""

    entry: int
    """Boundary at which vision enters."""
    until: Int[Tensor, "batch tokens"]
    """Boundary from which each visual token is not live; the model's depth for text."""
    into: Mapping[int, Int[Tensor, "batch tokens"]]
    """Boundary -> logical index of the token that takes each token's state."""
    boundaries: frozenset[int]
    """Boundaries at which tokens go or are merged."""

    @classmethod
    def of(cls, keeps: Sequence[Keeps], prompt: Prompt, layers: int) -> Replayed:
        """Place the keeps in a call; raises `UnsupportedCall` where they are not those of its prompts."""
        if len(keeps) != len(prompt.valid):
            raise _misfit(f"{len(keeps)} samples, but this call has {len(prompt.valid)}; give one for each, in order")
        if any(own.layers != layers for own in keeps):
            raise _misfit(f"{keeps[0].layers} layers, but this model has {layers}; use the model of the rollout")
        entries = {own.entry for own in keeps if own.visual}
        if len(entries) > 1:
            raise _misfit(f"vision enter at different boundaries ({sorted(entries)}); run these samples apart")
        until, into = torch.full(prompt.valid.shape, layers), dict[int, Tensor]()
        valid, present, all_visual = (own.cpu() for own in (prompt.valid, prompt.present, prompt.visual))
        for sample, (own, real, visual) in enumerate(zip(keeps, valid, all_visual & valid, strict=True)):
            at = real.nonzero()[:, 0]
            if visual.nonzero()[:, 0].tolist() != [int(at[place]) for place in own.visual if place < len(at)]:
                raise _misfit(
                    f"other visual tokens than sample {sample} of this call; replay the rollout's own prompts"
                )
            until[sample, visual] = torch.tensor(own.until, dtype=torch.long)
            for boundary, pairs in own.merges.items():
                if boundary not in into:
                    into[boundary] = torch.arange(until.shape[1]).repeat(len(keeps), 1)
                for token, target in pairs:
                    into[boundary][sample, at[token]] = at[target]
        entry, device = next(iter(entries), 0), prompt.valid.device
        if bool(((until > entry) & all_visual & ~present).any()):
            raise _misfit("tokens that an `encode` stage drops now; the pictures or the vision tower have changed")
        going = {boundary for boundary in until[all_visual].tolist() if entry <= boundary < layers}
        into = {boundary: own.to(device) for boundary, own in into.items()}
        return cls(entry, until.to(device), into, frozenset(going | into.keys()))

    def live_mask(self, before: Bool[Tensor, "batch tokens"], boundary: int) -> Bool[Tensor, "batch tokens"]:
        """Tokens of `before` that stay live at a boundary."""
        return before & (self.until > boundary)

    def merged(self, boundary: int, live: LiveSet) -> Int[Tensor, "batch slots"] | None:
        """The slot that takes each slot's state at a boundary; `None` where none is merged."""
        if boundary not in self.into:
            return None
        return live.slot.gather(1, self.into[boundary].gather(1, live.index))


def _misfit(what: str) -> UnsupportedCall:
    return UnsupportedCall(f"replay: the keeps have {what}")

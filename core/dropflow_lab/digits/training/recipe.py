"""The numbers of a training run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Steps, sizes and rates of all stages; the defaults are those of the shipped checkpoint `dense`."""

    decoder_layers: int = 12
    vision_steps: int = 2200
    vision_batch: int = 64
    vision_rate: float = 2.5e-3
    """Peak learning rate of the vision phase."""
    vision_validate_every: int = 250
    vision_validation: int = 256
    """Validation pictures, a multiple of 64."""
    short_steps: int = 700
    """Language steps on 48 visual tokens: the digits and some background."""
    full_steps: int = 450
    """Language steps on all 144 visual tokens."""
    mixed_steps: int = 800
    """Language steps on 24-144 visual tokens, chosen in three ways."""
    missing_tokens: bool = True
    """Whether the first and the third language stage leave visual tokens out; otherwise every step sees all 144."""
    tower: str = ""
    """Shipped checkpoint to take the vision tower from, without a vision phase; if empty, the tower is trained."""
    language_batch: int = 32
    room: int = 141
    """Tokens of questions after each picture, about twelve questions."""
    language_rate: float = 3e-3
    """Peak learning rate of the language phase."""
    language_validate_every: int = 100
    language_validation: int = 1000
    """Validation questions, one per picture, kinds in equal numbers."""

    @property
    def language_steps(self) -> int:
        """Steps of the three language stages together."""
        return self.short_steps + self.full_steps + self.mixed_steps


PLAIN = Recipe(missing_tokens=False, tower="dense")
"""The tower of `dense`, and a language model trained on all visual tokens only."""

SMOKE = Recipe(
    decoder_layers=2,
    vision_steps=20,
    vision_batch=4,
    vision_validate_every=20,
    vision_validation=64,
    short_steps=20,
    full_steps=20,
    mixed_steps=20,
    language_batch=4,
    room=45,
    language_validate_every=20,
    language_validation=20,
)
"""Twenty small steps of every stage, as a smoke test."""

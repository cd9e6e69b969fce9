"""A task's `generation_kwargs` as arguments of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dropflow.errors import nearest
from dropflow_lab.errors import InputError

_LONGEST = 1024
"""Tokens of an answer where the task does not say."""
_PASSED_ON = ("max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty", "length_penalty")
_SAMPLING = ("temperature", "top_p", "top_k")
_OF_OTHER_MODELS = ("image_aspect_ratio",)
"""What tasks say to models with their own image processing; transformers' processors decide it themselves."""


@dataclass(frozen=True)
class Generation:
    """How answers are generated, and where they end."""

    settings: tuple[tuple[str, Any], ...]
    """Arguments of `generate`, by name."""
    until: tuple[str, ...] = ()
    """Texts before which an answer ends."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Generation:
        """Return what a task asks for: greedy, unless it gives a temperature above 0 or `do_sample`.

        Raises `InputError` for a setting that is not known, which would otherwise be ignored.
        """
        known = (*_PASSED_ON, *_SAMPLING, *_OF_OTHER_MODELS, "max_gen_toks", "do_sample", "until")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"generation_kwargs: {unknown[0]}: not supported; {nearest(unknown[0], known)}")
        if given.get("max_gen_toks") is not None:
            given = {"max_new_tokens": given["max_gen_toks"], **given}
        options: dict[str, Any] = {"max_new_tokens": _LONGEST}
        options |= {name: given[name] for name in _PASSED_ON if given.get(name) is not None}
        if _sampled(given):
            options |= {"do_sample": True, **{name: given[name] for name in _SAMPLING if given.get(name) is not None}}
        else:
            options |= {"do_sample": False, **dict.fromkeys(_SAMPLING)}
        until = given.get("until") or ()
        return cls(tuple(options.items()), tuple(one for one in ([until] if isinstance(until, str) else until) if one))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        return dict(self.settings)

    def cut(self, text: str) -> str:
        """Return an answer up to the first stop text, without spaces around it."""
        ends = [place for stop in self.until if (place := text.find(stop)) >= 0]
        return (text[: min(ends)] if ends else text).strip()


def _sampled(given: Mapping[str, Any]) -> bool:
    temperature = given.get("temperature")
    if temperature is None:
        return bool(given.get("do_sample"))
    return bool(temperature > 0 and given.get("do_sample", True))

"""Models inside wrappers: PEFT's and DistributedDataParallel's, which call the model they hold."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version
from torch.nn.parallel import DistributedDataParallel

from dropflow.errors import UnsupportedCall

PEFT_CALLS_MODELS = Version("0.21")
"""From here on PEFT calls the model it holds; before, it called the model's `forward`, past every hook."""


def unwrapped(model: Any) -> Any:
    """The model of transformers in what PEFT or DistributedDataParallel has made of it."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    inner = getattr(model, "get_base_model", None)  # PEFT's own name for it
    return inner() if callable(inner) else model


def check_called(model: Any) -> None:
    """Refuse a call of the core that came past the model's hooks, so that labels and loss were not seen."""
    if getattr(model, "peft_config", None) is not None and _peft() < PEFT_CALLS_MODELS:
        raise UnsupportedCall(
            f"PEFT {_peft()} calls the forward of the model it holds past every hook, so that a policy would miss the "
            f"labels; upgrade to peft>={PEFT_CALLS_MODELS}, or use the model's own `add_adapter` instead of "
            "`get_peft_model`"
        )


@cache
def _peft() -> Version:
    try:
        return Version(version("peft"))
    except PackageNotFoundError:  # pragma: no cover  # a model has adapters, but not from a package of this name
        return PEFT_CALLS_MODELS

"""Models inside wrappers: torch.compile's, PEFT's and DistributedDataParallel's, which call the model they hold."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version
from torch import nn
from torch._dynamo import OptimizedModule, trace_rules
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from dropflow.errors import UnsupportedCall, UnsupportedModel

PEFT_CALLS_MODELS = Version("0.21")
"""From here on PEFT calls the model it holds; before, it called the model's `forward`, past every hook."""


def unwrapped(model: Any) -> Any:
    """The model of transformers in what torch.compile, PEFT or DistributedDataParallel has made of it."""
    while isinstance(model, DistributedDataParallel | OptimizedModule):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    inner = getattr(model, "get_base_model", None)  # PEFT's own name for it
    return inner() if callable(inner) else model


def check_is_model(model: Any) -> None:
    """Refuse what holds a model, or goes with one, in place of the model itself; says what to pass."""
    if isinstance(model, PreTrainedModel):
        return
    if isinstance(model, nn.Module):
        inside = {name: part for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)}
        if not inside:
            return  # somebody's own model, which an adapter may know
        name, part = next(iter(inside.items()))
        what = f"its `{name}` ({type(part).__name__}), and call that"
    elif isinstance(getattr(model, "model", None), nn.Module):  # a pipeline, a trainer
        what = f"its `model` ({type(model.model).__name__})"
    else:
        what = "what `from_pretrained` of the model's class returns"
    raise UnsupportedModel(f"expected a model of transformers, got {type(model).__name__}; pass {what}")


def check_compiled(parts: Mapping[str, Any]) -> None:
    """Refuse parts of a model that `torch.compile` replaced by wrappers of its own, which have not their layers.

    `parts` says what each is called in the message.
    """
    for name, part in parts.items():
        if isinstance(part, OptimizedModule):
            raise UnsupportedModel(
                f"{name}: replaced by what torch.compile returned for it; compile the whole model, or parts in place "
                "(`part.compile()`), such as each layer"
            )


@cache  # the rules are the process's, and grow with every call
def leave_uncompiled() -> None:
    """Let Dynamo run the code of this package as it is, and go on compiling what that calls, such as layers."""
    trace_rules.add(__name__.partition(".")[0])


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

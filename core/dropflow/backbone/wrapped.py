"""Models inside the wrappers of torch.compile, PEFT and DistributedDataParallel, which call the model they hold."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from dropflow.errors import UnsupportedCall, UnsupportedModel

PEFT_CALLS_MODELS = Version("0.21")
"""From this version on PEFT calls the model it holds; earlier ones call its `forward` and bypass every hook."""


def unwrapped(model: Any) -> Any:
    """The transformers model inside the wrappers of torch.compile, PEFT and DistributedDataParallel, if any."""
    while isinstance(model, DistributedDataParallel | OptimizedModule):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    inner = getattr(model, "get_base_model", None)  # PEFT's own name for it
    return inner() if callable(inner) else model


def check_is_model(model: Any) -> None:
    """Refuse an object that contains or accompanies a model instead of being one; the error says what to pass."""
    if isinstance(model, PreTrainedModel):
        return
    if isinstance(model, nn.Module):
        inside = {name: part for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)}
        if not inside:
            return  # a custom model, which an adapter may know
        name, part = next(iter(inside.items()))
        what = f"its `{name}` ({type(part).__name__}), and call that"
    elif isinstance(getattr(model, "model", None), nn.Module):  # a pipeline, a trainer
        what = f"its `model` ({type(model.model).__name__})"
    else:
        what = "what `from_pretrained` of the model's class returns"
    raise UnsupportedModel(f"expected a transformers model, got {type(model).__name__}; pass {what}")


def check_compiled(parts: Mapping[str, Any]) -> None:
    """Refuse parts of a model that `torch.compile` replaced by its own wrappers, which lack the layers of the parts.

    The keys of `parts` name them in the message.
    """
    for name, part in parts.items():
        if isinstance(part, OptimizedModule):
            raise UnsupportedModel(
                f"{name}: replaced by what torch.compile returned for it; compile the whole model, or parts in place "
                "(`part.compile()`), such as each layer"
            )


def check_called(model: Any) -> None:
    """Refuse a call of the core that bypassed the model's hooks, which would have seen the labels and the loss."""
    if getattr(model, "peft_config", None) is not None and _peft() < PEFT_CALLS_MODELS:
        raise UnsupportedCall(
            f"PEFT {_peft()} calls the forward of the model it holds and bypasses every hook, so a policy would miss "
            f"the labels; upgrade to peft>={PEFT_CALLS_MODELS}, or use the model's own `add_adapter` instead of "
            "`get_peft_model`"
        )


@cache
def _peft() -> Version:
    try:
        return Version(version("peft"))
    except PackageNotFoundError:  # pragma: no cover  # a model has adapters, but not from a package of this name
        return PEFT_CALLS_MODELS

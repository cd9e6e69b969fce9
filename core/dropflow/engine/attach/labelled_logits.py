"""Computes only the logits that predict a label, where the model's forward computes its loss by `loss_function`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

from torch import Tensor

from dropflow.engine.decoder.head import loss_of_rows
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.model.turns import names_inside
from dropflow.errors import UnsupportedModel


class LabelledLoss:
    """The loss function that stands for a model's own, given logits of some rows and the labels of every token."""

    def __init__(self, shadows: Shadows, rows: Callable[[], Tensor | None]) -> None:
        """`rows` returns the row that each position (batch, tokens) of the call reads; `None` where all have logits."""
        self._shadows, self._rows = shadows, rows
        self._standing: Any = None

    def lay(self, model: Any) -> None:
        """Put it over the model's loss function; again, if the user has set another one since."""
        if self._standing is None or model.__dict__.get("_loss_function") is not self._standing:
            self._standing = self._over(model.loss_function)
            self._shadows.lay(model.__dict__, "_loss_function", self._standing)

    def _over(self, original: Any) -> Any:
        @wraps(original)
        def loss(*args: Any, **kwargs: Any) -> Any:
            rows = self._rows()
            if rows is None:
                return original(*args, **kwargs)
            placed = dict(zip(("logits", "labels"), args, strict=False))

            def in_the_same_form(**asked: Any) -> Any:
                """Some models pass all by name, and others logits, labels and the vocabulary's size by place."""
                first = [asked.pop(name) for name in placed]
                return original(*first, *args[len(placed) :], **asked)

            given = placed | kwargs
            return loss_of_rows(in_the_same_form, given.pop("logits"), rows, given.pop("labels"), **given)

        return loss


def check_loss_function(model: Any) -> None:
    """Refuse `logits="labelled"` for a model whose forward does not compute its loss by `loss_function`."""
    own = getattr(model, "__dict__", {}).get("forward")
    forwards = [vars(kind).get("forward") for kind in type(model).__mro__] if own is None else [own]
    names = (getattr(inspect.unwrap(one), "__code__", None) for one in forwards if one is not None)
    if not any(code is not None and "loss_function" in code.co_names for code in names):
        _refuse_labelled(model)


def check_loss_call(model: Any) -> None:
    """The same for a call in progress, whose forward another library may have replaced on the model since."""
    if "forward" in model.__dict__ and "loss_function" not in names_inside(model):
        _refuse_labelled(model)


def _refuse_labelled(model: Any) -> NoReturn:
    raise UnsupportedModel(
        f"logits: 'labelled', but the forward of {type(model).__name__} does not compute its loss by "
        "`model.loss_function`, such as one with a fused loss; leave `logits` out, so that it gets all of them"
    )

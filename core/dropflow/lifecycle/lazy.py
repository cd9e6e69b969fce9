"""Attributes that are computed, and names of a package that are imported, when they are first read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, Generic, Self, TypeVar, overload

from dropflow.errors import MissingPackage
from dropflow.lifecycle.field_texts import show_field_texts

T = TypeVar("T")


class lazy(Generic[T]):  # noqa: N801  # a decorator
    """Turns a method into an attribute that is computed once.

    Up to Python 3.11 `functools.cached_property` computes under one lock for all instances of a class. A process forked
    while another thread held it would wait forever, and models would wait for each other.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> Self | T:
        if instance is None:
            return self
        value: T = self._make(instance)
        instance.__dict__[self._name] = value  # found first from now on, as there is no `__set__`
        return value


def lazy_names(package: str, homes: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that imports a name from its module when it is first read.

    `homes` maps modules to the names they define. A policy is validated without torch as long as nobody reads a name
    that needs it. Reading a name raises `MissingPackage` where a part of the package is installed that leaves it out.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def read(name: str) -> Any:
        if name not in home_of:
            # with both, Python itself says which name is close
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        try:
            home = import_module(home_of[name])
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(f"{package}."):
                raise
            raise MissingPackage(
                f"{package}.{name}: is in the distribution `dropflow`, of which a part is installed here; install it "
                "whole"
            ) from error
        found = getattr(home, name)
        show_field_texts(found)
        setattr(sys.modules[package], name, found)
        return found

    return read

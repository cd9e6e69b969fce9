"""Tiny models of every family with a built-in adapter: one file each, named like the adapter; `tiny.py` is the base."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pkgutil import iter_modules

from dropflow.backbone.backbone import Backbone
from dropflow.policy.registry import ADAPTERS, load
from dropflow.testing.families.tiny import Tiny


def tiny_models() -> dict[str, tuple[type[Backbone], Tiny]]:
    """Adapter name -> its class and its tiny model, for every family of this package, without network access.

    Families that the installed transformers does not have are left out.
    """
    found = {}
    for name in sorted(module.name for module in iter_modules(__path__) if module.name != "tiny"):
        with suppress(ImportError):
            found[name] = load(ADAPTERS, name), import_module(f"{__name__}.{name}").tiny()
    return found

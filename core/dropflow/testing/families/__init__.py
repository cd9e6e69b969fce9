"""Every family that has an adapter here, in miniature: one file each, named as the adapter; `tiny.py` is their base."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from dropflow.backbone.backbone import Backbone
from dropflow.policy.registry import ADAPTERS, load
from dropflow.testing.families.tiny import Tiny


def tiny_models() -> dict[str, tuple[type[Backbone], Tiny]]:
    """Adapter name -> its class and its family in miniature, for every family of this package; no network is used."""
    names = sorted(module.name for module in iter_modules(__path__) if module.name != "tiny")
    return {name: (load(ADAPTERS, name), import_module(f"{__name__}.{name}").tiny()) for name in names}

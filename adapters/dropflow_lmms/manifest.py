"""What lmms-eval finds through its entry points."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """Return the models of this package as lmms-eval registers them; lmms-eval calls it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="dropflow", chat_class_path="dropflow_lmms.model.Dropflow")]

"""Loads a model together with the policy that its checkpoint records."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText

from dropflow.backbone.backbone import Backbone, check_adapter
from dropflow.engine.attach.attach import attach
from dropflow.errors import UnsupportedModel, quoted
from dropflow.policy.policy_file import Source, load_policy
from dropflow.policy.recorded import recorded_policy

logger = logging.getLogger("dropflow")

_OF_FILES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments that say where files are, and therefore also apply to the config."""


def from_pretrained(
    folder: str | PathLike[str],
    policy: Source | None = None,
    *,
    overrides: Sequence[str] = (),
    adapter: str | type[Backbone] | None = None,
    allow_downloads: bool = False,
    weights: str | PathLike[str] | None = None,
    model_class: Any = AutoModelForImageTextToText,
    **kwargs: Any,
) -> Any:
    """Load a model with transformers and attach `policy` or, if none is given, the policy its checkpoint records.

    `transformers` itself, its pipelines and its server know nothing of Dropflow: they run a checkpoint that records a
    policy dense. This function returns the model in eval mode with the policy attached, ready for any of them;
    `dropflow.flow_of(model)` returns its flow. `folder` and `kwargs` are those of `model_class.from_pretrained`;
    `overrides`, `adapter`, `allow_downloads` (of models that a recorded policy names) and `weights` are those of
    `attach`. A line in the `dropflow` log says which policy is attached.

    Raises `PolicyError` before any weights are loaded if the policy cannot be read, or none is given and none is
    recorded, `UnsupportedModel` for a folder that is not there, and otherwise whatever transformers and `attach` raise.
    """
    _check(folder, model_class)
    check_adapter(adapter)
    if policy is not None:
        policy, overrides = load_policy(policy, overrides), ()  # before any weights are loaded
    else:
        if kwargs.get("config") is None:
            kwargs["config"] = AutoConfig.from_pretrained(
                folder, **{name: kwargs[name] for name in (*_OF_FILES, "trust_remote_code") if name in kwargs}
            )
        load_policy(recorded_policy(kwargs["config"], allow_downloads=allow_downloads), overrides)
    model = model_class.from_pretrained(folder, **kwargs)
    flow = attach(model, policy, overrides=overrides, adapter=adapter, allow_downloads=allow_downloads, weights=weights)
    whose = "recorded" if policy is None else "given"
    logger.info(
        "%s: the %s policy %r is attached; dropflow.detach(model) takes it off", folder, whose, flow.policy.name
    )
    return model


def _check(folder: Any, model_class: Any) -> None:
    """Refuse what transformers could not load a model from, with an error of its own for each kind of file system."""
    if not isinstance(folder, str | PathLike) or not str(folder):
        raise UnsupportedModel(f"folder: expected a model folder or the name of a model, got {quoted(folder)}")
    looks_local = isinstance(folder, PathLike) or str(folder).startswith(("/", ".", "~")) or str(folder).count("/") > 1
    if looks_local and not Path(folder).exists():
        raise UnsupportedModel(f"folder: {quoted(str(folder))}: no such folder; name one with a config.json")
    if not callable(getattr(model_class, "from_pretrained", None)):
        raise UnsupportedModel(
            "model_class: expected a class with `from_pretrained`, such as AutoModelForImageTextToText, got "
            f"{quoted(model_class)}"
        )

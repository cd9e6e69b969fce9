"""What is installed is what was meant to be shipped."""

from __future__ import annotations

from importlib.metadata import distribution

import pytest
from packages import PACKAGES


def test_the_wheel_holds_packages_policies_and_the_checkpoint() -> None:
    files = [str(path) for path in distribution("dropflow").files or ()]
    if not any(path.startswith("dropflow/") for path in files):
        pytest.skip("an editable install: the wheel is checked by `make test`")
    packages = {path.split("/")[0] for path in files if path.endswith(".py")}
    assert packages == set(PACKAGES)
    for needed in (
        "dropflow/py.typed",
        "dropflow_policies/hidrop-64.yaml",
        "dropflow_lab/trace/web/page.html",
        "dropflow_lab/trace/web/panels.js",
        "dropflow_lab/digits/checkpoints/dense/model.safetensors",
        "dropflow_lab/digits/checkpoints/dense/training-log.jsonl",
        "dropflow_lab/digits/checkpoints/dense-plain/model.safetensors",
        "dropflow_lab/digits/checkpoints/dense-plain/training-log.jsonl",
        "dropflow_lab/digits/checkpoints/hidrop/model.safetensors",
        "dropflow_lab/digits/checkpoints/hidrop/training-log.jsonl",
        "dropflow_lab/digits/checkpoints/hidrop-90/model.safetensors",
        "dropflow_lab/digits/checkpoints/hidrop-90/training-log.jsonl",
        "dropflow_lab/digits/checkpoints/clips/change.safetensors",
        "dropflow_lab/digits/checkpoints/clips/training-log.jsonl",
        "dropflow_lab/digits/checkpoints/conversations/change.safetensors",
        "dropflow_lab/digits/checkpoints/conversations/training-log.jsonl",
        "dropflow_policies/hidrop-digits.yaml",
        "dropflow_policies/hidrop-digits-90.yaml",
    ):
        assert needed in files
    assert not [path for path in files if "test" in path.split("/")[0]]

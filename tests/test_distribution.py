"""What is installed is what was meant to be shipped."""

from __future__ import annotations

from importlib.metadata import distribution

import pytest


def test_the_wheel_holds_packages_policies_and_the_checkpoint() -> None:
    files = [str(path) for path in distribution("dropflow").files or ()]
    if not any(path.startswith("dropflow/") for path in files):
        pytest.skip("an editable install: the wheel is checked by `make test`")
    packages = {path.split("/")[0] for path in files if path.endswith(".py")}
    assert packages == {
        "dropflow",
        "dropflow_lab",
        "dropflow_control",
        "dropflow_dart",
        "dropflow_divprune",
        "dropflow_fastv",
        "dropflow_hidrop",
        "dropflow_mustdrop",
        "dropflow_prumerge",
        "dropflow_pyramiddrop",
        "dropflow_sparsevlm",
        "dropflow_tome",
        "dropflow_visionzip",
        "dropflow_vtw",
        "dropflow_adapters",
        "dropflow_policies",
    }
    for needed in (
        "dropflow/py.typed",
        "dropflow_policies/hidrop-64.yaml",
        "dropflow_lab/trace/page.html",
        "dropflow_lab/digits/checkpoints/dense/model.safetensors",
        "dropflow_lab/digits/checkpoints/dense/training-log.jsonl",
        "dropflow_lab/digits/checkpoints/hidrop/model.safetensors",
        "dropflow_lab/digits/checkpoints/hidrop/training-log.jsonl",
        "dropflow_lab/digits/checkpoints/hidrop-90/model.safetensors",
        "dropflow_lab/digits/checkpoints/hidrop-90/training-log.jsonl",
        "dropflow_policies/hidrop-digits.yaml",
        "dropflow_policies/hidrop-digits-90.yaml",
    ):
        assert needed in files
    assert not [path for path in files if "test" in path.split("/")[0]]

"""The distribution for vLLM's environments holds what it needs, and nothing of it imports transformers."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from documents import ROOT

CODE = """
import sys
sys.modules["transformers"] = None  # whoever imports it fails
import importlib, pkgutil, torch
import dropflow, dropflow_vllm
assert dropflow.__file__.startswith(sys.argv[1]), dropflow.__file__
from dropflow import BackboneShape, EncodeOnly
from dropflow.errors import MissingPackage, PolicyError
from dropflow.policy import registry
for stage in registry.names(registry.STAGES):
    registry.load(registry.STAGES, stage)
read = refused = 0
for name in registry.policy_files():
    policy = dropflow.load_policy(name)
    shape = BackboneShape(policy.tuned_for.layers, policy.tuned_for.visual_tokens) if policy.tuned_for else None
    try:
        EncodeOnly(policy, shape or BackboneShape(32, 576), frozenset({"grid", "projector"}), host="vLLM")
        read += 1
    except PolicyError:
        refused += 1
one = {"name": "p", "stages": {"s": {"use": "divprune/max-min", "keep": 9}}}
(image,) = EncodeOnly(one, BackboneShape(32, 36)).reduce([torch.randn(36, 8)], [(6, 6)])
for missing in ("attach", "Backbone"):
    try:
        getattr(dropflow, missing)
    except MissingPackage as error:
        print(error)
for module in pkgutil.walk_packages(dropflow.__path__, "dropflow."):
    importlib.import_module(module.name)
print(read, refused, len(image.rows), len(registry.names(registry.STAGES)))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel; nothing is fetched."""
    source = ROOT / "distributions" / "vllm"
    if not source.exists():
        pytest.skip("the source tree is not beside the tests")
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("dropflow_vllm-*.whl")
    return found


def test_it_works_without_transformers(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        held.extractall(tmp_path)
    words = [sys.executable, "-P", "-c", CODE, str(tmp_path)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    *missing, counts = done.stdout.strip().split("\n")
    assert missing == [
        f"dropflow.{name}: is in the distribution `dropflow`, of which a part is installed here; install it whole"
        for name in ("attach", "Backbone")
    ]
    read, refused, rows, stages = map(int, counts.split())
    assert read >= 1
    assert refused >= 60
    assert rows == 9
    assert stages >= 34


def test_it_holds_the_same_files_and_needs_no_transformers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        names = held.namelist()
        (about,) = [name for name in names if name.endswith("dist-info/METADATA")]
        needs = [line for line in held.read(about).decode().splitlines() if line.startswith("Requires-Dist")]
        (points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "dropflow = dropflow_vllm:register" in held.read(points).decode()
        for name in names:
            if name.startswith("dropflow/"):
                assert held.read(name) == (ROOT / "core" / name).read_bytes()
    assert not any("transformers" in line for line in needs)
    packages = {name.split("/")[0] for name in names if name.endswith(".py")}
    assert {"dropflow", "dropflow_vllm", "dropflow_policies", "dropflow_divprune"} <= packages
    assert not packages & {"dropflow_lab", "dropflow_adapters"}
    assert "dropflow_policies/divprune-56.yaml" in names
    assert "dropflow/policy/policy_file.py" in names

"""Taking one fact out of an adapter makes the kit fail with a message that leads to it."""

from __future__ import annotations

import importlib
import inspect
import sys
import types

import pytest

from dropflow import Backbone
from dropflow.testing import BrokenGuarantee, assert_backbone_conforms, tiny_models

REMOVALS = [
    pytest.param(
        "qwen2_vl:Qwen2VL",
        '    modalities = ("image", "video")\n',
        "",
        r"Qwen2VL \(videos\): the fact 'token ids' is wrong: video: the adapter Qwen2VL knows no placeholder token for "
        r"it; add it to the adapter's `modalities`",
        id="token ids",
    ),
    pytest.param(
        "gemma3:Gemma3",
        "        return square_grid(tokens)\n",
        "        return None\n",
        r"Gemma3 \(images\): the fact 'grid' is wrong: image 0 has the grid \(4, 4\), the adapter says None; "
        r"see `grid` or `layouts` of Gemma3",
        id="grid",
    ),
    pytest.param(
        "idefics3:Idefics3",
        "        return [[ImageLayout(tile, self.grid(tile))] * (size // tile) for size in sizes]\n",
        "        return [[ImageLayout(size)] for size in sizes]\n",
        r"Idefics3 \(images\): the fact 'image owner' is wrong: token \d+ of sample 1 is a patch of image 2, but the "
        r"adapter gives it to an image with other patches; it states 2 images, the prompt has 4; see `layouts`",
        id="image owner",
    ),
    pytest.param(
        "llava_next:LlavaNext",
        "line_ends=True)\n                found",
        "line_ends=False)\n                found",
        r"LlavaNext \(images\): the fact 'token ids' is wrong: LlavaNext.layouts: states the grid \(8, 2\) for an "
        r"image of 24 patches; correct the adapter's grid or extra rows",
        id="newlines",
    ),
]


def without(adapter: str, line: str, instead: str) -> type[Backbone]:
    """The adapter as its source would read with that line gone."""
    module, name = adapter.split(":")
    whole = importlib.import_module(f"dropflow_adapters.{module}")
    source = inspect.getsource(whole)
    assert source.count(line) == 1, "the adapter no longer states this fact in this line"
    changed = types.ModuleType(f"changed_{module}")
    sys.modules[changed.__name__] = changed
    exec(compile(source.replace(line, instead), whole.__file__ or "", "exec"), changed.__dict__)
    found: type[Backbone] = getattr(changed, name)
    return found


@pytest.mark.parametrize(("adapter", "line", "instead", "message"), REMOVALS)
def test_a_missing_fact_is_named(adapter: str, line: str, instead: str, message: str) -> None:
    with pytest.raises(BrokenGuarantee, match=message):
        assert_backbone_conforms(without(adapter, line, instead), tiny_models()[adapter.split(":")[0]][1])

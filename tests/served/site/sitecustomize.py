"""Python runs this when it starts: torchvision, built for CUDA, is imported beside a torch for CPUs.

Without its compiled library, torchvision describes operators that nobody has declared, and fails; nothing here calls
them.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Declare(MetaPathFinder):
    """Declares the operators before the module that describes them is imported; finds nothing itself."""

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname == "torchvision._meta_registrations":
            import torch

            for name in OPERATORS:
                if not hasattr(torch.ops.torchvision, name):
                    torch.library.define(f"torchvision::{name}", SIGNATURE)


sys.meta_path.insert(0, Declare())

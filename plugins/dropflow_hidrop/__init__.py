"""HiDrop (arXiv:2602.23699): late injection, concave pyramid pruning and early exit."""

from dropflow_hidrop.concave_pyramid import ConcavePyramid
from dropflow_hidrop.early_exit import EarlyExit
from dropflow_hidrop.late_injection import LateInjection

__all__ = ["ConcavePyramid", "EarlyExit", "LateInjection"]

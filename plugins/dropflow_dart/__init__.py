"""DART (arXiv:2502.11494): a few pivot tokens, and the visual tokens that are least similar to them."""

from dropflow_dart.duplication import Duplication

__all__ = ["Duplication"]

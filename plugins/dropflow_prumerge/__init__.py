"""LLaVA-PruMerge (arXiv:2403.15388): outliers of CLS attention stay, with similar patches merged into them."""

from dropflow_prumerge.prune_merge import PruneMerge

__all__ = ["PruneMerge"]

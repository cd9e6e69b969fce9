"""FastV (arXiv:2403.06764): after the first layers, the visual tokens that the prompt's end attends to most stay."""

from dropflow_fastv.attention_rank import AttentionRank

__all__ = ["AttentionRank"]

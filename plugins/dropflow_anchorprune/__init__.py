"""AnchorPrune: tokens that the question asks for anchor the choice, and important ones unlike them extend it."""

from dropflow_anchorprune.anchor_expansion import AnchorExpansion

__all__ = ["AnchorExpansion"]

"""FlashVID (arXiv:2602.08024): tokens of a video are selected and merged before the LLM, and ranked inside it."""

from dropflow_flashvid.late_rank import LateRank
from dropflow_flashvid.tree_merging import TreeMerging

__all__ = ["LateRank", "TreeMerging"]

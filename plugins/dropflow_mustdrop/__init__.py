"""MustDrop (arXiv:2411.10803): spatial merging, key set, dual-attention filter and output-aware cache."""

from dropflow_mustdrop.dual_attention import DualAttention
from dropflow_mustdrop.key_set import KeySet
from dropflow_mustdrop.output_aware_cache import OutputAwareCache
from dropflow_mustdrop.spatial_merge import SpatialMerge
from dropflow_mustdrop.token_number import equal_token_number

__all__ = ["DualAttention", "KeySet", "OutputAwareCache", "SpatialMerge", "equal_token_number"]

"""SparseVLM (arXiv:2410.04417): text tokens that matter to the picture rate its tokens; the dropped are recycled."""

from dropflow_sparsevlm.gravity_corrected import GravityCorrected
from dropflow_sparsevlm.text_guided import TextGuided

__all__ = ["GravityCorrected", "TextGuided"]

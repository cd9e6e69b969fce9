"""VisionZip (arXiv:2412.04467): the patches that CLS attends to, and contextual tokens for all the others."""

from dropflow_visionzip.dominant_contextual import DominantContextual

__all__ = ["DominantContextual"]

"""VisionZip (arXiv:2412.04467): the patches CLS looks at, and contextual tokens for all the others."""

from dropflow_visionzip.dominant_contextual import DominantContextual

__all__ = ["DominantContextual"]

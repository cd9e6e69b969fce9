"""VisionSelector (arXiv:2510.16598): a trained scorer chooses the visual tokens that reach the LLM."""

from dropflow_visionselector.selector import Selector

__all__ = ["Selector"]

"""PyramidDrop (arXiv:2410.17247): visual tokens are halved at the boundaries between stages of the LLM."""

from dropflow_pyramiddrop.pyramid import Pyramid

__all__ = ["Pyramid"]

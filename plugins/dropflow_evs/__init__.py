"""EVS (arXiv:2510.14624): the tokens of a video that differ from the frame before stay."""

from dropflow_evs.retention import Retention

__all__ = ["Retention"]

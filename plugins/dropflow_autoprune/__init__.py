"""AutoPrune: how fast an image's tokens go follows from the information that question and picture share."""

from dropflow_autoprune.retention_curve import RetentionCurve

__all__ = ["RetentionCurve"]

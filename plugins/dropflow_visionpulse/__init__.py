"""VisionPulse: every decode step reads the visual entries that the new token attends to, and parks the others."""

from dropflow_visionpulse.decode_read import DecodeRead

__all__ = ["DecodeRead"]

"""VidCom2 (arXiv:2505.14454): the unusual tokens of a video stay, more of them in unusual frames."""

from dropflow_vidcom2.frame_compensation import FrameCompensation

__all__ = ["FrameCompensation"]

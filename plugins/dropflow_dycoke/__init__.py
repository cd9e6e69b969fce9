"""DyCoke (arXiv:2411.15024): of most frames only the tokens stay that differ from an earlier frame."""

from dropflow_dycoke.temporal import Temporal

__all__ = ["Temporal"]

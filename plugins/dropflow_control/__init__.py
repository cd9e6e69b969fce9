"""Controls that every method is compared with: subsets, whole frames, average pooling, and keeping everything."""

from dropflow_control.frames import Frames
from dropflow_control.keep_all import KeepAll
from dropflow_control.pool import Pool
from dropflow_control.random_subset import RandomSubset
from dropflow_control.stride import Stride

__all__ = ["Frames", "KeepAll", "Pool", "RandomSubset", "Stride"]

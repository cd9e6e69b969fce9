"""Controls that every method is compared with: random and uniform subsets, average pooling, and keeping everything."""

from dropflow_control.keep_all import KeepAll
from dropflow_control.pool import Pool
from dropflow_control.random_subset import RandomSubset
from dropflow_control.stride import Stride

__all__ = ["KeepAll", "Pool", "RandomSubset", "Stride"]

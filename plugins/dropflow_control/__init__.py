"""Controls that every method is compared with: a random subset of each image, and keeping everything."""

from dropflow_control.keep_all import KeepAll
from dropflow_control.random_subset import RandomSubset

__all__ = ["KeepAll", "RandomSubset"]

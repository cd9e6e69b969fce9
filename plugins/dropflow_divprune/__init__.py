"""DivPrune (arXiv:2503.02175): the most diverse visual tokens of each image, by max-min distance."""

from dropflow_divprune.max_min import MaxMin

__all__ = ["MaxMin"]

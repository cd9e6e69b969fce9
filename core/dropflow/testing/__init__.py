"""For people who write stages and adapters: the masked oracle that a pruned run must equal."""

from dropflow.testing.oracle import MaskedOracle

__all__ = ["MaskedOracle"]

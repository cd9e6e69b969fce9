"""VTW, visual tokens withdrawal (arXiv:2405.05803): no vision from a boundary on, and the search for that boundary."""

from dropflow_vtw.search import Search, divergence, find_boundary, first_within, last_logits
from dropflow_vtw.withdrawal import Withdrawal

__all__ = ["Search", "Withdrawal", "divergence", "find_boundary", "first_within", "last_logits"]

"""CDPruner (arXiv:2506.10967): tokens that are diverse and relevant to the question, by a conditional DPP."""

from dropflow_cdpruner.conditional_dpp import ConditionalDPP

__all__ = ["ConditionalDPP"]

"""Token Merging (ToMe, arXiv:2210.09461) inside the vision tower: similar tokens become one, layer by layer."""

from dropflow_tome.token_merging import TokenMerging

__all__ = ["TokenMerging"]

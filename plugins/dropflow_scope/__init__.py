"""SCOPE: the visual tokens that cover what an image shows, weighted by how much the encoder attends to them."""

from dropflow_scope.saliency_coverage import SaliencyCoverage

__all__ = ["SaliencyCoverage"]

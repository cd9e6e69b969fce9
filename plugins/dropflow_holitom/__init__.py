"""HoliTom (arXiv:2505.21334): static places of a video's windows become one row; of the rest the attended stay."""

from dropflow_holitom.folding import Folding
from dropflow_holitom.merging import Merging

__all__ = ["Folding", "Merging"]

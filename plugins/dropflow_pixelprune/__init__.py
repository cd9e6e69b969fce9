"""PixelPrune: units of an image that their neighbours predict, pixel by pixel, never enter the vision tower."""

from dropflow_pixelprune.components import Components
from dropflow_pixelprune.predict import Predict

__all__ = ["Components", "Predict"]

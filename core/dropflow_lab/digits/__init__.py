"""The embedded demo model: a small LLaVA that answers questions about pictures of handwritten digits."""

from .dataset import Example, examples, write_folder
from .evaluate import Accuracy, Score, answer, evaluate
from .glyphs import SPLITS
from .model import build_model, build_processor, checkpoint_path, export, load, sample_image
from .questions import KINDS
from .recipe import Recipe
from .train import train

__all__ = [
    "KINDS",
    "SPLITS",
    "Accuracy",
    "Example",
    "Recipe",
    "Score",
    "answer",
    "build_model",
    "build_processor",
    "checkpoint_path",
    "evaluate",
    "examples",
    "export",
    "load",
    "sample_image",
    "train",
    "write_folder",
]

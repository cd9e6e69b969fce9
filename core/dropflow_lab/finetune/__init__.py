"""Training a model through a policy by a recipe, with the Trainer of transformers."""

from typing import TYPE_CHECKING

from dropflow.lifecycle.lazy import lazy_names
from dropflow_lab.finetune.recipe import Recipe
from dropflow_lab.finetune.recipe_file import load_recipe

if TYPE_CHECKING:
    from dropflow_lab.finetune.checkpoints import RestoredWeights, last_whole_checkpoint, load_weights
    from dropflow_lab.finetune.collate import Collator
    from dropflow_lab.finetune.data import samples_of
    from dropflow_lab.finetune.folder import FolderDialogues
    from dropflow_lab.finetune.stages import StageProgress
    from dropflow_lab.finetune.train import finetune
else:
    _HOMES = {
        "dropflow_lab.finetune.checkpoints": ("RestoredWeights", "last_whole_checkpoint", "load_weights"),
        "dropflow_lab.finetune.collate": ("Collator",),
        "dropflow_lab.finetune.data": ("samples_of",),
        "dropflow_lab.finetune.folder": ("FolderDialogues",),
        "dropflow_lab.finetune.stages": ("StageProgress",),
        "dropflow_lab.finetune.train": ("finetune",),
    }
    __getattr__ = lazy_names(__name__, _HOMES)

__all__ = [
    "Collator",
    "FolderDialogues",
    "Recipe",
    "RestoredWeights",
    "StageProgress",
    "finetune",
    "last_whole_checkpoint",
    "load_recipe",
    "load_weights",
    "samples_of",
]

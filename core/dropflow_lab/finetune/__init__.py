"""Training a model through a policy, with the Trainer of transformers."""

from dropflow_lab.finetune.checkpoints import RestoredWeights, last_whole_checkpoint, load_weights
from dropflow_lab.finetune.collate import Collator
from dropflow_lab.finetune.folder import FolderDialogues
from dropflow_lab.finetune.settings import Settings
from dropflow_lab.finetune.train import finetune

__all__ = [
    "Collator",
    "FolderDialogues",
    "RestoredWeights",
    "Settings",
    "finetune",
    "last_whole_checkpoint",
    "load_weights",
]

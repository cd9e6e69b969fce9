"""Runs VLMEvalKit on a model under a policy.

    python run_vlmevalkit.py VLMEVALKIT_FOLDER pretrained=DIR,policy=NAME --data POPE ...

What follows the first two arguments is that of VLMEvalKit's `run.py`, without `--model`.
"""

import runpy
import sys
from functools import partial
from pathlib import Path

import vlmeval.config
import vlmeval.vlm
from vlmeval.vlm.base import BaseModel

from dropflow_lmms.answering import Answering
from dropflow_lmms.arguments import read_arguments
from dropflow_lmms.generation import Generation

NAME = "dropflow"


class DropflowVLM(BaseModel):
    """A model under a policy, as VLMEvalKit asks it; `arguments` are those of docs/lmms-eval.md."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, max_new_tokens=512, **arguments):
        super().__init__()
        self._generation = Generation.of({"max_new_tokens": int(max_new_tokens)})
        self._answering = Answering(read_arguments(arguments))

    def generate_inner(self, message, dataset=None):
        """Answer a list of `{"type": "text" | "image" | "video", "value": text or path}`."""
        del dataset  # every data set is asked through the model's chat template
        content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        (answer,) = self._answering.answer([[{"role": "user", "content": content}]], self._generation)
        return answer.text

    def means(self):
        """Return visual tokens, FLOPs and KV bytes of the prompts so far, as means."""
        return self._answering.totals.metrics()


def main():
    """Register the model and hand over to VLMEvalKit."""
    folder, given, *words = sys.argv[1:]
    arguments = dict(one.split("=", 1) for one in given.split(","))
    vlmeval.vlm.DropflowVLM = DropflowVLM
    vlmeval.config.supported_VLM[NAME] = partial(DropflowVLM, **arguments)
    sys.argv = [str(Path(folder) / "run.py"), "--model", NAME, *words]
    sys.path.insert(0, folder)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

"""Serves a model under several policies through OpenAI's chat API; needs the extra `serve`."""

from dropflow_lab.serve.keys import Keys
from dropflow_lab.serve.limits import Limits
from dropflow_lab.serve.names import DENSE, Names
from dropflow_lab.serve.server import Server, serving

__all__ = ["DENSE", "Keys", "Limits", "Names", "Server", "serving"]

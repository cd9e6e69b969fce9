"""vLLM: policies that reduce what a vision tower gave, in the server's own models (a plug-in of vLLM)."""

from dropflow_vllm.plugin import ARCHITECTURES, register
from dropflow_vllm.served import Served, served_llava, served_qwen

__all__ = ["ARCHITECTURES", "Served", "register", "served_llava", "served_qwen"]

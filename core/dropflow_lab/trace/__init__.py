"""Traces: who was kept, merged, protected or dropped, where and by which stage; a page to look at, and replay."""

from .asked import fingerprint, record, record_inputs
from .edit import drop_patches, keep_patches
from .page import page
from .replay import Replay, replay_policy
from .schema import Trace, TracedPrompt, TracedRun

__all__ = [
    "Replay",
    "Trace",
    "TracedPrompt",
    "TracedRun",
    "drop_patches",
    "fingerprint",
    "keep_patches",
    "page",
    "record",
    "record_inputs",
    "replay_policy",
]

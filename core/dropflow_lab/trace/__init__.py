"""Traces: which tokens were kept, merged, protected or dropped, where and by which stage; a page, and replay."""

from dropflow_lab.trace.asked import fingerprint, record, record_inputs
from dropflow_lab.trace.edit import drop_patches, keep_patches
from dropflow_lab.trace.page import page
from dropflow_lab.trace.replay import Replay, replay_policy
from dropflow_lab.trace.schema import Trace, TracedPrompt, TracedRun

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

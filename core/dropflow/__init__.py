"""Dropflow: an engine that lets fewer visual tokens flow through a multimodal LLM."""

from dropflow import errors
from dropflow.backbone import Backbone, Projections, VisionEncoder
from dropflow.flow import Flow, attach
from dropflow.hooks import hookimpl
from dropflow.payloads import (
    BoundaryEvent,
    CacheCall,
    CacheKeep,
    CacheView,
    Encode,
    EncodeCall,
    Entry,
    Keep,
    PruneCall,
    WindowCall,
)
from dropflow.policy import Policy
from dropflow.policy_file import load_policy
from dropflow.record import LayerReport, Report
from dropflow.stage import Forecast, Stage, StageContext, StageOptions, Window
from dropflow.views import View

__all__ = [
    "Backbone",
    "BoundaryEvent",
    "CacheCall",
    "CacheKeep",
    "CacheView",
    "Encode",
    "EncodeCall",
    "Entry",
    "Flow",
    "Forecast",
    "Keep",
    "LayerReport",
    "Policy",
    "Projections",
    "PruneCall",
    "Report",
    "Stage",
    "StageContext",
    "StageOptions",
    "View",
    "VisionEncoder",
    "Window",
    "WindowCall",
    "attach",
    "errors",
    "hookimpl",
    "load_policy",
]

"""Dropflow: an engine that lets fewer visual tokens flow through a multimodal LLM."""

from dropflow import errors
from dropflow.asking import asking
from dropflow.backbone import Backbone, Projections, Sublayers, VisionEncoder
from dropflow.cache_payloads import CacheCall, CacheKeep, CacheView
from dropflow.events import BoundaryEvent, CacheEvent, EncodeEvent, EncodeStep, Eviction
from dropflow.flow import Flow, attach
from dropflow.hooks import hookimpl
from dropflow.payloads import (
    Encode,
    EncodeCall,
    Entry,
    Exit,
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
    "CacheEvent",
    "CacheKeep",
    "CacheView",
    "Encode",
    "EncodeCall",
    "EncodeEvent",
    "EncodeStep",
    "Entry",
    "Eviction",
    "Exit",
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
    "Sublayers",
    "View",
    "VisionEncoder",
    "Window",
    "WindowCall",
    "asking",
    "attach",
    "errors",
    "hookimpl",
    "load_policy",
]

"""Dropflow: an engine that lets fewer visual tokens flow through a multimodal LLM."""

from dropflow import errors
from dropflow.backbone.backbone import Backbone, Projections, Sublayers, VisionEncoder
from dropflow.backbone.image_layout import ImageLayout
from dropflow.engine.attach.flow import Flow, attach
from dropflow.engine.decoder.record import LayerReport, Report
from dropflow.lifecycle.cache_payloads import CacheCall, CacheKeep, CacheView
from dropflow.lifecycle.events import BoundaryEvent, CacheEvent, EncodeEvent, EncodeStep, Eviction
from dropflow.lifecycle.hooks import hookimpl
from dropflow.lifecycle.payloads import (
    Encode,
    EncodeCall,
    Entry,
    Exit,
    Keep,
    PruneCall,
    WindowCall,
)
from dropflow.lifecycle.questions import questions
from dropflow.lifecycle.stage import Forecast, Stage, StageContext, StageOptions, Window
from dropflow.policy.policy import Policy
from dropflow.policy.policy_file import load_policy

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
    "ImageLayout",
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
    "VisionEncoder",
    "Window",
    "WindowCall",
    "attach",
    "errors",
    "hookimpl",
    "load_policy",
    "questions",
]

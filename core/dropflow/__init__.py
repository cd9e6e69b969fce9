"""Dropflow: an engine that lets fewer visual tokens flow through a multimodal LLM."""

from dropflow import errors, operators
from dropflow.backbone.backbone import FACTS, Backbone, Projections, Sublayers, VisionEncoder, backbone_for, square_grid
from dropflow.backbone.flops import DecoderWidths
from dropflow.backbone.image_layout import ImageLayout
from dropflow.engine.attach.attach import attach, attach_set, detach, flow_of
from dropflow.engine.attach.flow import Flow, FlowSet
from dropflow.engine.attach.pretrained import from_pretrained
from dropflow.engine.decoder.report import LayerReport, Report
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
from dropflow.lifecycle.stage import EncodeBoundary, Forecast, Stage, StageContext, StageOptions, Window
from dropflow.policy.policy import Policy
from dropflow.policy.policy_file import load_policy
from dropflow.units import BackboneShape, Budget, Depth, Rounding, Scale, Tokens

__all__ = [
    "FACTS",
    "Backbone",
    "BackboneShape",
    "BoundaryEvent",
    "Budget",
    "CacheCall",
    "CacheEvent",
    "CacheKeep",
    "CacheView",
    "DecoderWidths",
    "Depth",
    "Encode",
    "EncodeBoundary",
    "EncodeCall",
    "EncodeEvent",
    "EncodeStep",
    "Entry",
    "Eviction",
    "Exit",
    "Flow",
    "FlowSet",
    "Forecast",
    "ImageLayout",
    "Keep",
    "LayerReport",
    "Policy",
    "Projections",
    "PruneCall",
    "Report",
    "Rounding",
    "Scale",
    "Stage",
    "StageContext",
    "StageOptions",
    "Sublayers",
    "Tokens",
    "VisionEncoder",
    "Window",
    "WindowCall",
    "attach",
    "attach_set",
    "backbone_for",
    "detach",
    "errors",
    "flow_of",
    "from_pretrained",
    "hookimpl",
    "load_policy",
    "operators",
    "questions",
    "square_grid",
]

"""Dropflow: an engine that lets fewer visual tokens flow through a multimodal LLM."""

from typing import TYPE_CHECKING

from dropflow import errors, operators
from dropflow.backbone.flops import DecoderWidths
from dropflow.lifecycle.cache_payloads import CacheCall, CacheKeep, CacheSelect, CacheView, StepCall
from dropflow.lifecycle.events import BoundaryEvent, CacheEvent, EncodeEvent, EncodeStep, Eviction
from dropflow.lifecycle.field_texts import show_field_texts
from dropflow.lifecycle.hooks import hookimpl
from dropflow.lifecycle.instruction import instruction_tokens
from dropflow.lifecycle.lazy import lazy_names
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
from dropflow.lifecycle.stage import (
    EncodeBoundary,
    Forecast,
    ModelSource,
    Stage,
    StageContext,
    StageOptions,
    Window,
)
from dropflow.lifecycle.videos import videos
from dropflow.policy.policy import Policy
from dropflow.policy.policy_file import load_policy
from dropflow.units import BackboneShape, Budget, Depth, Rounding, Scale, Tokens

if TYPE_CHECKING:
    from dropflow.backbone.backbone import (
        FACTS,
        Backbone,
        Projections,
        Sublayers,
        VisionEncoder,
        backbone_for,
        square_grid,
    )
    from dropflow.backbone.image_layout import ImageLayout
    from dropflow.backbone.packed_tower import PackedTables, PackedTower
    from dropflow.backbone.vision_reader import VisionReader, feature_boundary, one_to_one, patch_blocks
    from dropflow.engine.attach.attach import attach, attach_set, detach, flow_of
    from dropflow.engine.attach.flow import Flow, FlowSet
    from dropflow.engine.attach.prefix import Prefix, Prefixes
    from dropflow.engine.attach.pretrained import from_pretrained
    from dropflow.engine.decoder.keeps import Keeps
    from dropflow.engine.decoder.parked import parked_bytes
    from dropflow.engine.decoder.report import LayerReport, Report
    from dropflow.engine.vision.encode_only import EncodeOnly, ReducedImage
else:
    _HOMES = {
        "dropflow.backbone.backbone": (
            "FACTS",
            "Backbone",
            "Projections",
            "Sublayers",
            "VisionEncoder",
            "backbone_for",
            "square_grid",
        ),
        "dropflow.backbone.image_layout": ("ImageLayout",),
        "dropflow.backbone.packed_tower": ("PackedTables", "PackedTower"),
        "dropflow.backbone.vision_reader": ("VisionReader", "feature_boundary", "one_to_one", "patch_blocks"),
        "dropflow.engine.attach.attach": ("attach", "attach_set", "detach", "flow_of"),
        "dropflow.engine.attach.flow": ("Flow", "FlowSet"),
        "dropflow.engine.attach.prefix": ("Prefix", "Prefixes"),
        "dropflow.engine.attach.pretrained": ("from_pretrained",),
        "dropflow.engine.decoder.keeps": ("Keeps",),
        "dropflow.engine.decoder.parked": ("parked_bytes",),
        "dropflow.engine.decoder.report": ("LayerReport", "Report"),
        "dropflow.engine.vision.encode_only": ("EncodeOnly", "ReducedImage"),
    }
    __getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "FACTS",
    "Backbone",
    "BackboneShape",
    "BoundaryEvent",
    "Budget",
    "CacheCall",
    "CacheEvent",
    "CacheKeep",
    "CacheSelect",
    "CacheView",
    "DecoderWidths",
    "Depth",
    "Encode",
    "EncodeBoundary",
    "EncodeCall",
    "EncodeEvent",
    "EncodeOnly",
    "EncodeStep",
    "Entry",
    "Eviction",
    "Exit",
    "Flow",
    "FlowSet",
    "Forecast",
    "ImageLayout",
    "Keep",
    "Keeps",
    "LayerReport",
    "ModelSource",
    "PackedTables",
    "PackedTower",
    "Policy",
    "Prefix",
    "Prefixes",
    "Projections",
    "PruneCall",
    "ReducedImage",
    "Report",
    "Rounding",
    "Scale",
    "Stage",
    "StageContext",
    "StageOptions",
    "StepCall",
    "Sublayers",
    "Tokens",
    "VisionEncoder",
    "VisionReader",
    "Window",
    "WindowCall",
    "attach",
    "attach_set",
    "backbone_for",
    "detach",
    "errors",
    "feature_boundary",
    "flow_of",
    "from_pretrained",
    "hookimpl",
    "instruction_tokens",
    "load_policy",
    "one_to_one",
    "operators",
    "parked_bytes",
    "patch_blocks",
    "questions",
    "square_grid",
    "videos",
]

for _name in __all__:
    show_field_texts(globals().get(_name))

"""One forward of an attached model, from its first hook to its last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dropflow.engine.decoder.records import Forward
from dropflow.engine.decoder.site import DecoderRun, Site
from dropflow.engine.tokens.prompt import VisualTokens
from dropflow.engine.tokens.row_flags import RowFlags
from dropflow.engine.vision.vision_run import VisionRun

if TYPE_CHECKING:
    from dropflow.engine.attach.flow import Flow


@dataclass(eq=False)
class Call:
    """All that belongs to one call: made when it begins, gone when it ends, however it ends."""

    owner: Any
    """The module whose hooks opened this call and will close it, or the method that encodes images by itself."""
    flow: Flow | None
    """The policy that counts; `None` where the model runs dense."""
    site: Site | None
    labels: Tensor | None = None
    logits_to_keep: int = 0
    attention_mask: Any = None
    visual: VisualTokens | None = None
    """Visual tokens, if this call brings images."""
    flags: dict[str, RowFlags] = field(default_factory=dict)
    """Modality -> flags of the rows of its features."""
    loss: Mapping[str, Any] | None = None
    """Arguments of the loss, if it is computed after the model on live positions."""
    live_rows: Tensor | None = None
    """Row of the head's input that each position (batch, tokens) reads, where it runs on live positions only."""
    core_runs: bool = False
    """True between the first hook of the core and its last."""
    outer: Any = None
    """What `serving` held before this call, such as that of a call whose stage runs this model."""
    encoding: bool = False
    """True while a features method runs, which may call another one."""
    vision: VisionRun | None = None
    """The pass through the vision encoder that runs now."""
    forward: Forward | None = None
    """What is noted of the pass through the text decoder when it has ended."""
    decoder: DecoderRun | None = None
    """The pass through the text decoder that runs now."""

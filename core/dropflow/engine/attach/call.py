"""One forward of an attached model, from its first hook to its last."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dropflow.engine.decoder.records import Forward
from dropflow.engine.decoder.site import DecoderRun, Site
from dropflow.engine.model.side_work import SideWork
from dropflow.engine.tokens.ahead import Ahead
from dropflow.engine.tokens.prompt import VisualTokens
from dropflow.engine.tokens.row_flags import RowFlags
from dropflow.engine.vision.vision_run import VisionRun

if TYPE_CHECKING:
    from dropflow.engine.attach.flow import Flow
    from dropflow.engine.attach.overlap import Promise
    from dropflow.engine.model.traced_step import TracedPolicy


@dataclass(eq=False)
class Call:
    """The state of one call: created when the call begins, discarded when it ends, however it ends."""

    owner: Any
    """The module whose hooks opened this call and will close it, or a features method that was called directly."""
    flow: Flow | None
    """The policy that applies; `None` where the model runs dense."""
    site: Site | None
    chosen: TracedPolicy | None = None
    """The same policy, as static caches name it."""
    labels: Tensor | None = None
    logits_to_keep: int | Tensor = 0
    attention_mask: Any = None
    visual: VisualTokens | None = None
    """Visual tokens, if this call brings images."""
    ahead: tuple[Ahead, Tensor] | None = None
    """The prefix with which this call begins, and the token (batch,) at which it does in each sample."""
    flags: dict[str, RowFlags] = field(default_factory=dict)
    """Modality -> flags of its feature rows."""
    labelled_only: bool = False
    """Whether the LM head and the loss run only on positions that predict a label."""
    live_rows: Tensor | None = None
    """Row of the LM head's input that each position (batch, tokens) reads, where it does not run on all of them."""
    serial: str | None = None
    """Why images are encoded before the decoder where `overlap` is on; `None` if they may be encoded beside it."""
    promised: dict[str, Promise] = field(default_factory=dict)
    """Modality -> its features, if they are encoded beside the decoder's first layers."""
    work: SideWork[Any] | None = None
    """The thread that encodes them."""
    features: dict[str, Any] = field(default_factory=dict)
    """Modality -> its features as the model's own method made them beside the decoder's first layers."""
    core_runs: bool = False
    """True between the first and the last hook of the core."""
    outer: Any = None
    """The value of `serving` before this call, for example that of an outer call whose stage runs this model."""
    encoding: bool = False
    """True while a features method runs; it may call another one."""
    vision: VisionRun | None = None
    """The current pass through the vision encoder."""
    forward: Forward | None = None
    """What is recorded of the pass through the text decoder once it has ended."""
    decoder: DecoderRun | None = None
    """The current pass through the text decoder."""
    losses: list[Tensor] = field(default_factory=list)
    """Terms that stages add to the loss of training."""
    loss: Tensor | None = None
    """Their weighted sum, once it has been added to the model's own loss."""

    def encodes(self, modality: str) -> str:
        """What the method of `modality` encodes now: some models encode the videos of a call with that for images."""
        brought = () if self.visual is None else self.visual.places
        missing = [name for name in brought if name not in self.flags and name not in self.promised]
        return missing[0] if missing and modality not in missing else modality

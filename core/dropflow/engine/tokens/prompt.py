"""What is known of a prompt before the decoder runs: its visual tokens, their images, and the instruction tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.engine.tokens.host import Extent, read
from dropflow.engine.tokens.row_flags import RowFlags
from dropflow.errors import UnsupportedModel
from dropflow.lifecycle.instruction import before_labels


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual tokens of a call."""

    mask: Bool[Tensor, "batch tokens"]
    places: Mapping[str, Int[Tensor, "rows 2"]]
    """Modality -> sample and token of each of its placeholders, in order; empty if the caller stated the tokens."""

    @classmethod
    def found(cls, masks: Mapping[str, Bool[Tensor, "batch tokens"]]) -> VisualTokens | None:
        """The visual tokens of all modalities (one host synchronisation for each); `None` if there are none."""
        places = {modality: mask.nonzero() for modality, mask in masks.items()}
        if not any(len(rows) for rows in places.values()):
            return None
        return cls(torch.stack(list(masks.values())).any(0), places)

    def rows(self, flags: Mapping[str, RowFlags]) -> Mapping[str, RowFlags] | None:
        """`flags` of the features of each modality; `None` if the engine did not observe the encoding of some modality.

        Raises `UnsupportedModel` if the numbers of placeholders and features differ.
        """
        if not self.places or not self.places.keys() <= flags.keys():
            return None
        for modality, places in self.places.items():
            rows, found = len(flags[modality]), len(places)
            if rows != found:
                remedy = "pass the prompt's own images, or correct `modalities` or `visual_ids` of the adapter"
                if rows and found % rows == 0:  # some families repeat features in their own code
                    remedy = "generate one sequence per sample, without beams, if samples were repeated; " + remedy
                raise UnsupportedModel(
                    f"the prompt has {found} {modality} placeholders by the adapter's token ids, but the model encoded "
                    f"{rows} rows of {modality} features; {remedy}"
                )
        return {modality: flags[modality] for modality in self.places}


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens of one call, by logical index."""

    image_id: Int[Tensor, "batch tokens"]
    """Number of the image to which a visual token belongs; -1 for text and padding."""
    valid: Bool[Tensor, "batch tokens"]
    """False for padding."""
    present: Bool[Tensor, "batch tokens"]
    """Valid tokens without the visual ones that an `encode` stage dropped."""
    protected: Bool[Tensor, "batch tokens"]
    """Visual tokens that no stage may drop."""
    instruction_slots: Int[Tensor, "batch rows"]
    """Logical index of the instruction tokens."""
    instruction_valid: Bool[Tensor, "batch rows"]
    image_sizes: tuple[int, ...]
    """Number of present patches of each image."""
    patches: Int[Tensor, "images"]
    """`image_sizes` on the device."""
    extents: Mapping[str, Extent]
    """How many tokens are `valid`, `present` and `text`, and an upper bound `after` for text after the first visual."""
    extra: Bool[Tensor, "batch tokens"] | None = None
    """Visual tokens that are not patches, such as newlines (see `ImageLayout`); `None` if there are none."""
    line: Int[Tensor, "batch tokens"] | None = None
    """Number of the line to which each visual token belongs, 0 for other tokens; set if `extra` is."""
    lines: int = 0
    """Upper bound (exclusive) of the line numbers."""
    carried: Float[Tensor, "batch tokens carries"] | None = None
    """Numbers that stages attached to visual tokens (`Plan.carries` gives each stage's columns); `None` for none."""
    tower: Float[Tensor, "batch tokens"] | None = None
    """Share of the vision tower's layers that ran on each patch, 0 for other tokens; `None` if the engine did not
    observe the encoding."""
    video_id: Int[Tensor, "batch tokens"] | None = None
    """Number of the video of each patch, -1 for other tokens; `None` if the engine did not observe the encoding."""
    videos: int = 0
    """Upper bound (exclusive) of the numbers of videos."""
    questions: tuple[str, ...] | None = None
    """The question of each sample as text, if a stage reads it."""

    @property
    def scored(self) -> Int[Tensor, "batch tokens"]:
        """Image number of patches; -1 for text, padding and visual tokens that are not patches."""
        return self.image_id if self.extra is None else self.image_id.masked_fill(self.extra, -1)

    def without_widows(self, live_mask: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """`live_mask` without the extra tokens of lines in which no patch is left."""
        if self.extra is None or self.line is None:
            return live_mask
        alive = live_mask & self.visual & ~self.extra
        count = torch.zeros(live_mask.shape[0], self.lines, dtype=torch.long, device=live_mask.device)
        count.scatter_add_(1, self.line, alive.long())
        return live_mask & ~(self.extra & ~self.protected & (count.gather(1, self.line) == 0))

    @property
    def answer_sources(self) -> Bool[Tensor, "batch tokens"]:
        """Visual tokens from which an answer is predicted, as where a caption directly follows its image."""
        counts = torch.zeros_like(self.image_id).scatter_add_(1, self.instruction_slots, self.instruction_valid.long())
        return (counts > 0) & self.visual & self.present

    def keeping_answer_sources(self) -> Prompt:
        """The same prompt with its answer sources protected."""
        return replace(self, protected=self.protected | self.answer_sources)

    @property
    def visual(self) -> Bool[Tensor, "batch tokens"]:
        """Visual tokens, including dropped ones."""
        return self.image_id >= 0

    @property
    def text(self) -> Bool[Tensor, "batch tokens"]:
        """Text tokens, excluding padding."""
        return self.valid & ~self.visual


def make_prompt(
    visual: VisualTokens,
    flags: Mapping[str, RowFlags] | None,
    valid: Bool[Tensor, "batch tokens"],
    instruction: tuple[Tensor, Tensor],
    tokens_per_image: int | None,
) -> Prompt:
    """Build the prompt from what the adapter, `encode` stages and caller state; one host synchronisation.

    `flags` has one row per placeholder of each modality; image numbers continue from one modality to the next. Without
    `flags`, images are separated by `tokens_per_image` or, failing that, are runs of adjacent visual tokens.
    """
    tokens = _Placed(visual.mask, valid)
    if flags is None:
        tokens.number_runs(tokens_per_image)
    else:
        tokens.place(visual.places, flags)
    return tokens.prompt(instruction)


class _Placed:
    """The per-token numbers of a prompt under construction."""

    def __init__(self, visual: Tensor, valid: Tensor) -> None:
        self._visual, self._valid = visual, valid
        self._image_id = torch.full(visual.shape, -1, dtype=torch.long, device=visual.device)
        self._present, self._protected = valid.clone(), torch.zeros_like(visual)
        self._extra: Tensor | None = None
        self._line: Tensor | None = None
        self._carried: Tensor | None = None
        self._tower: Tensor | None = None
        self._video: Tensor | None = None
        self._most_images = self._lines = 0

    def number_runs(self, tokens_per_image: int | None) -> None:
        """Number the images across the batch, so that images of different samples never share a number."""
        visual = self._visual
        if tokens_per_image is not None:
            number = (visual.long().cumsum(1) - 1) // tokens_per_image
        else:
            starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
            number = starts.long().cumsum(1) - 1
        images = number.masked_fill(~visual, -1).amax(1) + 1
        number = number + (images.cumsum(0) - images)[:, None]
        self._image_id = torch.where(visual, number, -1)
        ((self._most_images,),) = read(images.sum())

    def place(self, places: Mapping[str, Tensor], flags: Mapping[str, RowFlags]) -> None:
        """Scatter each row's flags to its placeholder."""
        lines, width = max(rows.lines for rows in flags.values()), max(rows.carried.shape[1] for rows in flags.values())
        shape, device = self._visual.shape, self._visual.device
        if lines:
            self._extra = torch.zeros_like(self._visual)
            self._line = torch.zeros(shape, dtype=torch.long, device=device)
        if width:
            self._carried = torch.zeros(*shape, width, device=device)
        self._tower = torch.zeros(shape, device=device)
        self._video = torch.full(shape, -1, dtype=torch.long, device=device)
        images = sum(rows.images for rows in flags.values())
        first = 0
        for modality, rows in flags.items():
            at = places[modality].to(device).unbind(1)
            number = rows.image.to(device) + first
            self._image_id.index_put_(at, number)
            self._present.index_put_(at, rows.kept.to(device) & self._valid[at])
            self._protected.index_put_(at, rows.protected.to(device))
            self._tower.index_put_(at, rows.tower.to(device).masked_fill(rows.extra.to(device), 0.0))
            video = rows.video.to(device)
            self._video.index_put_(at, torch.where((video < 0) | rows.extra.to(device), -1, video + first))
            if self._extra is not None and self._line is not None:
                self._extra.index_put_(at, rows.extra.to(device))
                self._line.index_put_(at, (rows.owner.to(device) + first) * lines + rows.line.to(device))
            if self._carried is not None:
                self._carried[..., : rows.carried.shape[1]].index_put_(at, rows.carried.to(device))
            first += rows.images
        self._lines, self._most_images = images * lines, images * len(self._visual)
        self._image_id = _number_copies(self._image_id, images)
        self._video = _number_copies(self._video, images)

    def prompt(self, instruction: tuple[Tensor, Tensor]) -> Prompt:
        """The finished prompt."""
        image_id, present = self._image_id, self._present
        scored = image_id if self._extra is None else image_id.masked_fill(self._extra, -1)
        counts = torch.zeros(self._most_images + 1, dtype=torch.long, device=image_id.device)
        counts.index_add_(0, scored.flatten() + 1, present.flatten().long())
        text = self._valid & ~self._visual
        after = text & (self._visual.cumsum(1) > 0)
        (last,), sizes, *per_sample = read(
            image_id.max(), counts, *(mask.sum(1) for mask in (self._valid, present, text, after))
        )
        return Prompt(
            image_id=image_id,
            valid=self._valid,
            present=present,
            protected=self._protected,
            instruction_slots=instruction[0],
            instruction_valid=instruction[1],
            image_sizes=tuple(sizes[1 : last + 2]),
            patches=counts[1 : last + 2],
            extents=dict(zip(("valid", "present", "text", "after"), map(Extent.of, per_sample), strict=True)),
            extra=self._extra,
            line=self._line,
            lines=self._lines,
            carried=self._carried,
            tower=self._tower,
            video_id=self._video,
            videos=self._most_images,
        )


def _number_copies(image_id: Int[Tensor, "batch tokens"], images: int) -> Int[Tensor, "batch tokens"]:
    """Image numbers of visual tokens; if `generate` repeats samples, as for beams, each copy gets its own numbers."""
    shown = torch.zeros(len(image_id), images + 1, dtype=torch.long, device=image_id.device)
    shown.scatter_(1, image_id + 1, 1)
    copy = (shown.cumsum(0) - 1).gather(1, image_id + 1)
    return torch.where(image_id < 0, image_id, image_id + copy * images)


def valid_tokens(
    attention_mask: Any, batch: int, tokens: int, device: torch.device, seen: int | None = None
) -> Bool[Tensor, "batch tokens"]:
    """Which of the last `tokens` tokens are not padding, from a (batch, all) or (batch, heads, tokens, all) mask.

    If there is one mask per kind of layer, any of them will do. `seen` tokens came before; the mask of a static cache
    has columns for future tokens.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if attention_mask.dim() == 4:  # a token that may not see itself is padding
        seen = attention_mask.shape[3] - tokens if seen is None else seen
        diagonal = attention_mask[:, 0].diagonal(seen, dim1=1, dim2=2)[:, :tokens]
        real: Tensor = diagonal if diagonal.dtype == torch.bool else diagonal == 0
    else:
        first = attention_mask.shape[1] - tokens
        first = max(first if seen is None else min(first, seen), 0)
        real = attention_mask[:, first : first + tokens].bool()
    return real.expand(batch, -1).to(device)


def instruction_tokens(
    valid: Bool[Tensor, "batch tokens"],
    labels: Tensor | None,
    logits_to_keep: int | Int[Tensor, "kept"],
    starts: Bool[Tensor, "batch tokens"] | None = None,
    stated: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Int[Tensor, "batch rows"], Bool[Tensor, "batch rows"]]:
    """Logical index of the instruction tokens, and which of the entries are valid.

    They are what the caller `stated`, if anything. With labels, these are the last token before every labelled span, so
    one per round (HiDrop, section 3.2) and none for a sample without labels. Otherwise it is the last token of the
    prompt, or of every document if `starts` says that rows are packed. A call that asks for the logits of several
    positions, to score an answer or to verify drafts, has its prompt before the second of them: then the last token up
    to the first of these positions asks, in packed rows in the document that holds it.
    """
    if stated is not None:
        return _columns(stated.to(valid.device) & valid)
    if labels is not None:
        return _columns(before_labels(labels).to(valid.device) & valid)
    number = torch.arange(valid.shape[1], device=valid.device)
    first: int | Tensor = valid.shape[1] - 1
    if isinstance(logits_to_keep, Tensor):
        first = logits_to_keep.to(valid.device).min()
    elif logits_to_keep > 1:
        first = valid.shape[1] - logits_to_keep
    if starts is not None:
        starts = starts.to(valid.device)
        following = torch.nn.functional.pad(starts[:, 1:] | ~valid[:, 1:], (0, 1), value=True)
        document = starts.cumsum(1)
        scored = document == torch.where(number == first, document, 0).amax(1, keepdim=True)
        return _columns(torch.where(scored, number == first, following) & valid)
    asked = valid & (number <= first)
    return torch.where(asked, number, 0).amax(1, keepdim=True), asked.any(1, keepdim=True)


def document_starts(position_ids: Any) -> Bool[Tensor, "batch tokens"] | None:
    """Where position ids (batch, tokens) restart, as in packed rows; `None` if they never do.

    Of multimodal positions (4, batch, tokens), the first plane holds the text positions.
    """
    if not isinstance(position_ids, Tensor) or not (position_ids.dim() == 2 or len(position_ids) == 4):
        return None
    position_ids = position_ids if position_ids.dim() == 2 else position_ids[0]
    starts = torch.nn.functional.pad(position_ids[:, 1:] < position_ids[:, :-1], (1, 0))
    return starts if bool(starts.any()) else None


def _columns(mask: Bool[Tensor, "batch tokens"]) -> tuple[Int[Tensor, "batch rows"], Bool[Tensor, "batch rows"]]:
    """The columns where each row is true, in order and padded on the left; at least one column."""
    most = max(Extent.read(mask).high, 1)
    index = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)[:, -most:]
    return index, mask.gather(1, index)

"""What is known of a prompt before the decoder runs: which tokens are visual, of which image, and who asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.backbone.image_layout import CARRIED, EXTRA, IMAGE, KEPT, LINE, PROTECTED
from dropflow.errors import UnsupportedModel


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens of one call, by logical index."""

    image_id: Int[Tensor, "batch tokens"]
    """Number of the image a visual token belongs to; -1 for text and padding."""
    valid: Bool[Tensor, "batch tokens"]
    """False for padding."""
    present: Bool[Tensor, "batch tokens"]
    """Valid tokens less the visual ones that an encode stage dropped."""
    protected: Bool[Tensor, "batch tokens"]
    """Visual tokens that no stage may drop."""
    instruction_slots: Int[Tensor, "batch rows"]
    """Logical index of the instruction tokens."""
    instruction_valid: Bool[Tensor, "batch rows"]
    image_sizes: tuple[int, ...]
    """Present patches of each image."""
    extra: Bool[Tensor, "batch tokens"] | None = None
    """Visual tokens that are no patches, such as newlines (see `image_layout.py`); `None` where there are none."""
    line: Int[Tensor, "batch tokens"] | None = None
    """Number of the line each visual token belongs to, 0 for all others; goes with `extra`."""
    carried: Float[Tensor, "batch tokens carries"] | None = None
    """What stages gave visual tokens to carry (`Plan.carries` says whose is where); `None` where nothing."""
    questions: tuple[str, ...] | None = None
    """What each sample asks, as text, where a stage reads it."""

    @property
    def scored(self) -> Int[Tensor, "batch tokens"]:
        """Image number of patches; -1 for text, padding and visual tokens that are no patches."""
        return self.image_id if self.extra is None else self.image_id.masked_fill(self.extra, -1)

    def without_widows(self, live_mask: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """`live_mask` less the extra tokens of whose line no patch is left."""
        if self.extra is None or self.line is None:
            return live_mask
        alive = live_mask & self.visual & ~self.extra
        count = torch.zeros(live_mask.shape[0], int(self.line.max()) + 1, dtype=torch.long, device=live_mask.device)
        count.scatter_add_(1, self.line, alive.long())
        return live_mask & ~(self.extra & ~self.protected & (count.gather(1, self.line) == 0))

    @property
    def answer_sources(self) -> Bool[Tensor, "batch tokens"]:
        """Visual tokens that an answer is predicted from, as where a caption follows its image at once."""
        asks = (
            torch.zeros_like(self.image_id).scatter_add_(1, self.instruction_slots, self.instruction_valid.long()) > 0
        )
        return asks & self.visual & self.present

    def keeping_answer_sources(self) -> Prompt:
        """The same, with those tokens protected."""
        return replace(self, protected=self.protected | self.answer_sources)

    @property
    def visual(self) -> Bool[Tensor, "batch tokens"]:
        """Visual tokens, dropped ones included."""
        return self.image_id >= 0

    @property
    def text(self) -> Bool[Tensor, "batch tokens"]:
        """Text tokens, padding excluded."""
        return self.valid & ~self.visual


def make_prompt(
    visual: Bool[Tensor, "batch tokens"],
    flags: Float[Tensor, "rows flags"] | None,
    valid: Bool[Tensor, "batch tokens"],
    instruction: tuple[Tensor, Tensor],
    tokens_per_image: int | None,
) -> Prompt:
    """Put together what adapter, encode stages and caller say.

    `flags` has one row per visual token in (batch, token) order (see `image_layout.py`). Without it images are told
    apart by `tokens_per_image`, or else as runs of adjacent visual tokens.
    """
    image = torch.full(visual.shape, -1, dtype=torch.long, device=visual.device)
    present, protected = valid.clone(), torch.zeros_like(visual)
    if flags is None:
        image[visual] = _number_images(visual, tokens_per_image)[visual]
        return Prompt(image, valid, present, protected, *instruction, _sizes(image, present))
    flags = flags.to(visual.device)
    image[visual] = _number_copies(visual, flags[:, IMAGE].long())
    present[visual] &= flags[:, KEPT] > 0
    protected[visual] = flags[:, PROTECTED] > 0
    carried = None
    if flags.shape[1] > CARRIED:
        carried = flags.new_zeros(*visual.shape, flags.shape[1] - CARRIED)
        carried[visual] = flags[:, CARRIED:]
    if not bool((flags[:, EXTRA] > 0).any()):
        return Prompt(image, valid, present, protected, *instruction, _sizes(image, present), carried=carried)
    extra, line = torch.zeros_like(visual), torch.zeros_like(image)
    extra[visual] = flags[:, EXTRA] > 0
    own = flags[:, IMAGE] * (flags[:, LINE].max() + 1) + flags[:, LINE]
    line[visual] = torch.unique(own, return_inverse=True)[1]
    sizes = _sizes(image.masked_fill(extra, -1), present)
    return Prompt(image, valid, present, protected, *instruction, sizes, extra, line, carried)


def join_flags(
    visual: Mapping[str, Bool[Tensor, "batch tokens"]], flags: Mapping[str, Float[Tensor, "rows flags"]]
) -> Float[Tensor, "rows flags"] | None:
    """Flags of all visual tokens in (batch, token) order; images of a later modality are numbered on.

    `None` where some modality was encoded without anybody seeing it. Raises `UnsupportedModel` where placeholders and
    features differ in number.
    """
    if not visual or not visual.keys() <= flags.keys():
        return None
    first = next(iter(visual.values()))
    columns = max(CARRIED, *(rows.shape[1] for rows in flags.values()))
    table = torch.zeros(*first.shape, columns, device=first.device)
    anywhere, offset = torch.zeros_like(first), 0
    for modality, where in visual.items():
        rows = flags[modality].to(first.device)
        found = int(where.sum())
        if len(rows) != found:
            remedy = "correct `modalities` or `visual_ids` of the adapter"
            if len(rows) and found % len(rows) == 0:  # some families repeat features by code of their own
                remedy = "generate one sequence per sample, without beams, if samples were repeated; or else " + remedy
            raise UnsupportedModel(
                f"the prompt has {found} {modality} placeholders by the adapter's token ids, but the model encoded "
                f"{len(rows)} rows of {modality} features; {remedy}"
            )
        table[where] = rows + offset * (torch.arange(columns, device=rows.device) == IMAGE)
        anywhere |= where
        offset += int(rows[:, IMAGE].max()) + 1 if len(visual) > 1 and len(rows) else 0
    return table[anywhere]


def _number_images(visual: Tensor, tokens_per_image: int | None) -> Tensor:
    """Images numbered through the batch, so that images of different samples never share a number."""
    if tokens_per_image is not None:
        number = (visual.long().cumsum(1) - 1) // tokens_per_image
    else:
        starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        number = starts.long().cumsum(1) - 1
    images = number.masked_fill(~visual, -1).amax(1) + 1
    return number + (images.cumsum(0) - images)[:, None]


def _number_copies(visual: Bool[Tensor, "batch tokens"], image: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """Numbers of the images of visual tokens; where `generate` repeats samples, as for beams, each copy has its own."""
    if not len(image):
        return image
    sample, images = visual.nonzero()[:, 0], int(image.max()) + 1
    shown = torch.zeros(len(visual), images, dtype=torch.long, device=visual.device)
    shown[sample, image] = 1
    copy = shown.cumsum(0)[sample, image] - 1
    return image + copy * images


def _sizes(image: Tensor, present: Tensor) -> tuple[int, ...]:
    counts = torch.zeros(image.shape[0], int(image.max()) + 2, dtype=torch.long, device=image.device)
    counts.scatter_add_(1, image + 1, present.long())
    return tuple(counts.amax(0).tolist()[1:])


def valid_tokens(attention_mask: Any, batch: int, tokens: int, device: torch.device) -> Bool[Tensor, "b t"]:
    """Which of the last `tokens` tokens are no padding, from a (batch, all) or (batch, heads, tokens, all) mask.

    Of masks given per kind of layer, any one says it.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if attention_mask.dim() == 4:  # a token that may not see itself is padding
        diagonal = attention_mask[:, 0].diagonal(attention_mask.shape[3] - tokens, dim1=1, dim2=2)
        seen = diagonal if diagonal.dtype == torch.bool else diagonal == 0
    else:
        seen = attention_mask[:, -tokens:].bool()
    real: Tensor = seen.expand(batch, -1).to(device)
    return real


def instruction_tokens(
    valid: Bool[Tensor, "batch tokens"], labels: Tensor | None, logits_to_keep: int
) -> tuple[Int[Tensor, "batch rows"], Bool[Tensor, "batch rows"]]:
    """Logical index of the tokens that ask, and which entries count.

    With labels: the last token in front of every labelled span, so one per round (HiDrop, section 3.2), none for a
    sample without labels. Otherwise the last token of the prompt; where `generate` has put draft tokens behind it
    (prompt lookup), that is the first position whose logits it asks for.
    """
    if labels is not None:
        asks = torch.nn.functional.pad((labels[:, :-1] == -100) & (labels[:, 1:] != -100), (0, 1)) & valid
        rows = max(int(asks.sum(1).max()), 1)
        index = torch.argsort(asks.to(torch.uint8), dim=1, stable=True)[:, -rows:]
        return index, asks.gather(1, index)
    last = valid.shape[1] - 1 - valid.flip(1).to(torch.uint8).argmax(1)
    if logits_to_keep > 1:
        last = last - (logits_to_keep - 1)
    return last.clamp(min=0)[:, None], valid.any(1)[:, None]

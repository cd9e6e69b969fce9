"""The frozen payloads that lifecycle hooks receive, and the decisions they return.

Letters in shapes: B samples, T logical tokens, M slots (live tokens of the longest sample; shorter ones are padded on
the left), H query heads, R query rows, K keys, D hidden size, n_i rows of image i, C width of the vision encoder.
torch is imported only where it is used, since validating a policy loads plug-ins that import this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dropflow.errors import DecisionError
from dropflow.lifecycle.asked_rows import asked_rows
from dropflow.lifecycle.lazy import lazy

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int
    from torch import Tensor, nn

    from dropflow.backbone.backbone import Backbone
    from dropflow.engine.model.attention import QueryKey
    from dropflow.engine.vision.tower_layer import TowerLayer
    from dropflow.lifecycle.stage import EncodeBoundary, Window
    from dropflow.units import Budget

    RowAttention = Callable[[int, Tensor], Tensor]
    Members = Callable[[int], tuple[Int[Tensor, "rows members"], ...]]
    Weights = Callable[[int], tuple[Float[Tensor, "rows members"], ...] | None]
    Tower = Callable[[int], TowerLayer]
    Lazily = Callable[[], tuple[Tensor, ...]]
    Tapped = Callable[[int], QueryKey]
    States = Callable[[int], Tensor]


@dataclass(frozen=True)
class WindowCall:
    """Payload of `inject` and `exit`: what is known before the first decoder layer runs."""

    backbone: Backbone
    """The model, as its adapter describes it."""
    text_tokens: Int[Tensor, "batch"]
    """Text tokens of each sample in this call, padding excluded."""
    _count: Callable[[], Int[Tensor, "batch"]]

    @lazy
    def visual_tokens(self) -> Int[Tensor, "batch"]:
        """Visual tokens of each sample that reach the LLM.

        With `overlap`, reading it waits until the images have been encoded, and no layer runs meanwhile.
        """
        return self._count()


@dataclass(frozen=True)
class Entry:
    """What entered the LLM in this call, by logical token, before any layer ran."""

    embeds: Float[Tensor, "batch tokens dim"]
    """Text embeddings and projected image features, those that an `encode` stage made included."""
    image_id: Int[Tensor, "batch tokens"]
    """Image number of the patches that entered; -1 for text, padding, newlines and what an `encode` stage dropped."""


@dataclass(frozen=True)
class Exit:
    """Decision of `exit` for a stage that sets more than the boundary."""

    boundary: int
    """Boundary from which no vision is live."""
    keep_answer_sources: bool = False
    """Whether visual tokens from which an answer is predicted stay live to the end; no stage may then drop them."""


@dataclass(frozen=True)
class PruneCall:
    """Payload of `prune`: the live tokens before one decoder layer, one slot each."""

    boundary: int
    """Boundary at which the stage is asked."""
    hidden: Float[Tensor, "batch slots dim"]
    """States of the live tokens, as the layer after the boundary will get them."""
    index: Int[Tensor, "batch slots"]
    """Logical index of the token in each slot."""
    valid: Bool[Tensor, "batch slots"]
    """False in padding slots, where a keep mask may have any value."""
    image_id: Int[Tensor, "batch slots"]
    """Number, over the whole batch, of the image a visual token belongs to; -1 for text and padding. Where `generate`
    repeats samples, as for beams, the images of every copy have numbers of their own.

    An image is what has a patch grid of its own: a picture, a tile of a large one, or a frame of a video. Visual
    tokens that are not patches, such as newlines, have -1 too, and are dropped with the last patch of their line.
    """
    text: Bool[Tensor, "batch slots"]
    """Text tokens; visual tokens that are not patches, such as newlines, are neither text nor part of an image."""
    protected: Bool[Tensor, "batch slots"]
    """Tokens an `encode` stage protects: they stay whatever the keep mask says."""
    image_sizes: tuple[int, ...]
    """Patches each image had at entry to the LLM, by image number."""
    instruction_slots: Int[Tensor, "batch rows"]
    """Slots of the instruction tokens: the last one of the prompt, or with labels the last one of every round."""
    instruction_valid: Bool[Tensor, "batch rows"]
    """False where a sample has fewer instruction tokens than the others; one with none has nothing to rank by."""
    window: Window
    """Where vision enters and exits in this call."""
    entry: Entry
    """What entered the LLM."""
    attention: RowAttention
    """Called by `attention_rows`."""
    tapped: Tapped
    """Called by `keys` and `rotary`."""
    final_norm: Callable[[Tensor], Tensor] | None
    """The norm after the decoder's last layer; `None` where the backbone does not name it (fact `final_norm`)."""

    carried: Float[Tensor, "batch slots carries"] | None = None
    """What this stage's `encode` gave each patch to carry (`Encode.carry`), float32; 0 for all other tokens."""
    questions: tuple[str, ...] | None = None
    """The question of each sample, as text, for stages with `reads_questions`."""
    patches: Int[Tensor, "images"] | None = None
    """`image_sizes` on the device (see `counts`)."""
    videos: Int[Tensor, "batch slots"] | None = None
    """Read by `video_id`."""
    video_count: int = 0
    """Upper bound (exclusive) of the numbers in `video_id`."""
    most_text: int | None = None
    """Upper bound on the text tokens that follow a sample's first visual token."""
    notes: Mapping[str, Float[Tensor, "batch ..."]] = field(default_factory=dict)
    """Numbers about each sample that stages noted at earlier boundaries of this call (`Keep.notes`), the last ones of
    each stage, by its name in the policy: its own are at `self.context.name`. Not to be changed."""
    returned: States | None = None
    """Called by `states`."""
    differentiable: bool = False
    """Whether the model trains and the stage asked for gradients (`Stage.differentiable`): `attention_rows` and
    `hidden` then carry them, and `Keep.weights` are applied."""
    module: nn.Module | None = None
    """The trained module of the stage (`Stage.build_module`)."""
    progress: float = 0.0
    """How far training has come, from 0 to 1, for stages with `follows_progress`; 0 where nobody says."""

    def counts(self, budget: Budget) -> Int[Tensor, "images"]:
        """How many tokens of each image `budget` keeps, by image number; computed on the device without a wait."""
        import torch

        sizes = self.patches
        return budget.of_each(torch.tensor(self.image_sizes, device=self.index.device) if sizes is None else sizes)

    @property
    def video_id(self) -> Int[Tensor, "batch slots"]:
        """Number, over the whole batch, of the video a patch belongs to; -1 for all other tokens, and of pictures.

        For stages with `reads_videos`. Copies of a sample have videos of their own, as they have images.
        """
        if self.videos is None:
            raise DecisionError("the videos of this call are not known; let `reads_videos` of the stage be true")
        return self.videos

    def keys(self, layer: int) -> Float[Tensor, "batch kv_heads slots dim"]:
        """Keys of an earlier layer that the stage lists in `taps`, after k-norm and RoPE, for the slots.

        Raises `DecisionError` for a layer before the one in which vision enters.
        """
        return self.tapped(layer).key[:, :, -self.index.shape[1] :]

    def values(self, layer: int) -> Float[Tensor, "batch kv_heads slots dim"]:
        """Values of an earlier layer that the stage lists in `taps`, for the slots, as `keys`.

        For stages with `reads_states`. Raises `DecisionError` as `keys` does.
        """
        value = self.tapped(layer).value
        if value is None:
            raise DecisionError(
                f"values of layer {layer}: let the stage's `reads_states` be true, so that they are kept"
            )
        return value[:, :, -self.index.shape[1] :]

    def states(self, layer: int) -> Float[Tensor, "batch slots dim"]:
        """States that an earlier layer in `taps` handed to the layer after it, for the slots.

        Nothing that was decided after it ran has changed them. For stages with `reads_states`. Raises `DecisionError`
        for other layers, and for one before the one in which vision enters.
        """
        if self.returned is None:
            raise DecisionError(f"states of layer {layer}: list the layer in `taps` and let `reads_states` be true")
        return self.returned(layer)

    def rotary(self, layer: int) -> tuple[Float[Tensor, "batch slots dims"], Float[Tensor, "batch slots dims"]]:
        """cos and sin with which an earlier layer that the stage lists in `taps` rotated q and k of the slots.

        Every angle appears twice, once for each number of the pair it rotates; in a head wider than `dims`, only that
        part is rotated. For stages that need the fact `rotary`. Raises `DecisionError` as `keys` does, and where the
        layer received something else.
        """
        found = self.tapped(layer).rotary
        if not isinstance(found, tuple) or len(found) != 2 or any(part.dim() != 3 for part in found):
            raise DecisionError(
                f"layer {layer}: expected cos and sin of shape (batch, tokens, dims) as its `position_embeddings`, got "
                f"{type(found).__name__}; the adapter should not state the fact 'rotary' (see `Backbone.rotates_pairs`)"
            )
        cos, sin = (part.to(self.index.device).expand(len(self.index), -1, -1) for part in found)
        return cos, sin

    def attention_rows(self, layer: int, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows keys"]:
        """Attention probabilities of a few query rows of one layer, as the eager model would show them.

        `layer` is the boundary itself (its norm, q, k and RoPE are applied to the live tokens, nothing is written to
        the cache), or an earlier layer the stage lists in `taps`. `rows` are slots. Softmax runs in float32 over all
        keys the row may see, so values over the visual tokens do not sum to 1. The last M keys are the slots; keys of
        earlier turns, if any, come first. Only R rows are computed, never a K x K map.

        Gradients reach the hidden states and the boundary layer's norm, q and k if `differentiable` is true, and stop
        here otherwise. A tapped layer under reentrant gradient checkpointing gives none.

        Tokens dropped since a tapped layer ran keep their share of its softmax, and have no column. A layer before the
        one in which vision enters raises `DecisionError`, and so do rows that are not there.
        """
        import torch

        with (
            asked_rows(layer, rows, len(self.index), self.index.shape[1], "(batch, rows)") as rows,
            torch.set_grad_enabled(self.differentiable),
        ):
            return self.attention(layer, rows)


@dataclass(frozen=True)
class Keep:
    """Decision of `prune`."""

    mask: Bool[Tensor, "batch slots"]
    """True for tokens that stay. Entries of text, padding and protected tokens are ignored: they cannot be dropped."""
    scores: Float[Tensor, "batch slots"] | None = None
    """What the stage ranked by, for observers."""
    weights: Float[Tensor, "batch slots"] | None = None
    """Soft weights of the visual tokens that stay, positive and finite; applied where the payload is `differentiable`.

    From this boundary on, every attention softmax counts the token's key as this many keys (see `weights.py`); 1
    leaves the forward pass unchanged, and 0 would equal dropping the token. Other entries are ignored.
    """
    notes: Float[Tensor, "batch ..."] | None = None
    """Numbers about each sample for stages at later boundaries of this call (`PruneCall.notes`), in place of those that
    the stage noted before; `None` leaves these."""
    merge_into: Int[Tensor, "batch slots"] | None = None
    """For each slot, the slot of a token of the same image into which its state is merged; its own if it is not merged.
    For stages with `reads_videos`, the frames of a video count as one image.

    Before this boundary's layer, a token whose slot is named gets the plain mean of the states that name it, and keeps
    its index and position. `mask` decides whether a merged token itself stays. The state of a named token that stays
    and names another slot moves there, so that states can be reordered. Entries of text and padding are ignored. No
    state may move where other tokens of its sample are protected or dropped by another stage at this boundary, or where
    tokens have soft weights or carry numbers.
    """
    loss: Float[Tensor, ""] | None = None
    """A term for the loss of training, already weighted; read where the model trains (see `Flow.stage_loss`)."""


@dataclass(frozen=True)
class EncodeCall:
    """Payload of `encode`: the rows of each image, before or inside the vision encoder or on its output.

    In a packed tower (fact `units`), the rows at `pixels` and before a layer are units: the m x m patches that become
    one token, joined. Their width is m * m * channels * times * height * width at `pixels`, m * m * C before a layer.
    """

    boundary: EncodeBoundary
    """Which of the stage's `encode_at` this call is for; `None` is the projected output before the LLM."""
    features: tuple[Float[Tensor, "rows dim"], ...]
    """Patch rows of each image (picture, tile or frame), without CLS and newline rows."""
    prefix_rows: Float[Tensor, "images prefix dim"]
    """Rows (such as CLS) that the encoder holds before the patches; after the projector, none are given."""
    places: tuple[Int[Tensor, "rows"], ...]
    """For each row, which of the image's patches it stands for (0-based, ascending, row by row of the grid)."""
    sizes: tuple[Float[Tensor, "rows"], ...]
    """Number of patches that each row is the mean of, as stated by the stages that merged them; 1 if not merged."""
    grids: tuple[tuple[int, int] | None, ...]
    """Patch grid (rows, columns) of each image before any reduction, of units in a packed tower; `None` where the
    backbone does not know it."""
    prefix: int
    """Rows (such as CLS) that the vision encoder holds before the patches."""
    has_cls: bool
    """Whether the encoder's first row is a CLS row, whose attention ranks patches."""
    tower: Tower
    """Called by the methods below: what a tapped layer of the encoder computed."""
    members: Members
    """For a tapped layer, the rows of the encoder that each present row of each image is made of; -1 for none."""
    videos: tuple[tuple[int, ...], ...] | None = ()
    """For each video, the numbers of its frames among the images, in the order of time; images in none are pictures.

    `None` where nobody says, which cannot be for stages with `reads_videos`. A frame of a video may be left without any
    row.
    """
    separate: bool = True
    """Whether every row is one row of the encoder (fact `vision_layers`), rather than made of several (see
    `VisionReader`)."""
    training: bool = False
    """Whether the model trains: it is in `train()` and gradients are enabled."""
    module: nn.Module | None = None
    """The trained module of the stage (`Stage.build_module`)."""
    progress: float = 0.0
    """How far training has come, from 0 to 1, for stages with `follows_progress`; 0 where nobody says."""
    weights: Weights | None = None
    """For a tapped layer, how much each of the `members` counts in its row; `None` where all count the same."""

    def query_keys(
        self, layer: int
    ) -> tuple[tuple[Float[Tensor, "heads rows dim"], Float[Tensor, "heads rows dim"]], ...]:
        """q and k of a tapped vision layer for the prefix and the present rows of each image, before any scaling.

        A negative `layer` counts from the encoder's end. Raises `DecisionError` as `cls_attention` does, and where rows
        are made of several rows of the encoder: only `unit_keys` knows those.
        """
        import torch

        self._check_separate("query_keys", "ask for `unit_keys`")
        seen = self.tower(layer).parts[0].whole()
        first, found = torch.arange(self.prefix, device=seen.key.device), []
        for image, members in enumerate(self.members(layer)):
            own, width = members[:, 0].to(first.device), seen.key.shape[2]
            of_rows = (part[own // width, :, own % width].transpose(0, 1) for part in (seen.query, seen.key))
            of_prefix = (part[image, :, first] for part in (seen.query, seen.key))
            found.append(tuple(torch.cat(pair, 1).to(members.device) for pair in zip(of_prefix, of_rows, strict=True)))
        return tuple((query, key) for query, key in found)

    def unit_keys(self, layer: int, *, joined: bool = False) -> tuple[Float[Tensor, "rows dim"], ...]:
        """Keys of a tapped vision layer for the present rows of each image, averaged over heads.

        With `joined` the heads stay side by side, in float32. A row that is made of several rows of the encoder has the
        mean of their keys. Raises `DecisionError` as `cls_attention` does.
        """
        return self._means(layer, self.tower(layer).keys(joined=joined))

    def attention_rows(self, layer: int, rows: Int[Tensor, "images rows"]) -> Float[Tensor, "images heads rows keys"]:
        """Attention probabilities of a few rows of a vision layer that the stage lists in `vision_taps`.

        Rows and keys count the encoder's own tokens: the prefix first, then the patches; keys of padding are 0. A
        negative `layer` counts from the encoder's end. Raises `DecisionError` as `query_keys` does, and for rows that
        are not there.
        """
        self._check_separate("attention_rows", "ask for `cls_attention` or `received_attention`")
        keys = self.tower(layer).parts[0].key
        with asked_rows(layer, rows, keys.shape[0], keys.shape[2], "(images, rows)") as rows:
            return self.tower(layer).attention(rows).to(rows.device)

    def cls_attention(self, layer: int, *, joined: bool = False) -> tuple[Float[Tensor, "rows"], ...]:
        """Attention from the CLS row of a tapped vision layer to each present row, averaged over heads.

        One row is computed, not a map; the softmax runs over all keys, so that values do not sum to 1. With `joined`
        the layer counts as one head of its whole width, in float32. A row that is made of several rows of the encoder
        has their mean, by the weights with which it is interpolated, if it is. Raises `DecisionError` where a stage has
        merged rows since that layer ran without saying which (`Encode.shares`), and for an encoder without a CLS row.
        """
        if not self.has_cls:
            raise DecisionError(
                "the vision encoder has no CLS row; list `cls` in the stage's `needs`, or ask for `received_attention`"
            )
        return self._means(layer, self.tower(layer).cls(joined=joined))

    def received_attention(self, layer: int) -> tuple[Float[Tensor, "rows"], ...]:
        """Attention that each present row received from the patches of its picture in a tapped vision layer.

        The sum over these patches, averaged over heads and divided by their number. In a layer with window attention
        the sum runs over the row's window and the divisor stays, so that windows compete only inside themselves: name a
        layer with full attention. A row that is made of several rows of the encoder has their mean, as in
        `cls_attention`; the time steps of a video are pictures. For encoders without a CLS row. It costs the work of
        one attention map, done in slices much smaller than the map. Raises `DecisionError` where a stage has merged
        rows since that layer ran without saying which.
        """
        return self._means(layer, self.tower(layer).received())

    def _means(self, layer: int, values: Tensor) -> tuple[Tensor, ...]:
        """The mean of the values (encoder rows, ...) over the members of each present row, by their weights."""
        found, weights = [], None if self.weights is None else self.weights(layer)
        for image, members in enumerate(self.members(layer)):
            own = values.to(members.device)[members.clamp(min=0)]
            part = (members >= 0).to(own.dtype)
            if weights is not None:
                part = part * weights[image].to(part)
            part = part.view(*part.shape, *[1] * (own.dim() - 2))
            found.append((own * part).sum(1) / part.sum(1).clamp(min=1e-6))  # nothing for rows of no member
        return tuple(found)

    def _check_separate(self, asked: str, instead: str) -> None:
        if not self.separate:
            raise DecisionError(
                f"{asked}: on this backbone a row is made of several rows of the vision encoder; {instead}, or list "
                "`vision_layers` in the stage's `needs`"
            )


@dataclass(frozen=True)
class Encode:
    """Decision of `encode`; one entry per image in each tuple, `None` for what it leaves unchanged."""

    keep: tuple[Bool[Tensor, "rows"], ...] | None = None
    """Rows that stay."""
    rows: tuple[Float[Tensor, "merged dim"], ...] | None = None
    """New rows that replace the present ones, such as merged tokens; requires `places`, and excludes `keep`.

    In a packed tower a new row has the position, and the attention window, of the unit whose place it takes."""
    places: tuple[Int[Tensor, "merged"], ...] | None = None
    """For each new row, the placeholder it fills: taken from the payload's `places`, ascending."""
    sizes: tuple[Float[Tensor, "merged"], ...] | None = None
    """Number of patches that each new row is the mean of, for `EncodeCall.sizes` of later calls; 1 if left out."""
    proportional: bool = False
    """Whether the attention of the encoder's later layers counts each new row as many times as its size says (the
    logarithm of the size is added to its logits), so that a merged row weighs as much as its members did. Packed
    towers cannot."""
    protect: tuple[Bool[Tensor, "rows"], ...] | None = None
    """Rows, among those present after this decision, that no later stage may drop."""
    carry: tuple[Float[Tensor, "rows carries"], ...] | None = None
    """Numbers that each row present after this decision carries to `prune` of the same stage, as many as its
    `Stage.carries` says. When another stage replaces a row, the new row carries the numbers of the one it replaces."""
    shares: Lazily | None = None
    """Returns a matrix (new rows, old rows) per image, with the weights of the old rows in `rows`.

    For observers, and for later stages that ask what an earlier layer of the encoder says of the new rows: the mean
    over the old rows that have a weight.

    Where `prefix_rows` contribute too, their columns follow those of the old rows.
    """
    across_frames: bool = False
    """Whether new rows are made of rows of several frames: for the frames of a video, the columns of `shares` then are
    the old rows of all its frames, one after the other in the order of time. Rows of other images cannot be merged."""
    scores: Lazily | None = None
    """For observers: returns the score that the stage gave each old row, per image; NaN for rows it did not rank."""
    loss: Float[Tensor, ""] | None = None
    """A term for the loss of training, already weighted; read where the model trains (see `Flow.stage_loss`)."""

    @property
    def decides(self) -> bool:
        """Whether the decision drops, replaces or protects rows."""
        return any(part is not None for part in (self.keep, self.rows, self.protect))

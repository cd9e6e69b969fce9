"""Backbone adapters: they say where a model's parts are and which tokens are visual, never what to do with them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dropflow.backbone import flops
from dropflow.backbone.flops import DecoderWidths
from dropflow.backbone.image_layout import ImageLayout
from dropflow.backbone.mixers import Mixer, PlaceScale, mixers_of, shape_of
from dropflow.backbone.packed_tower import PackedTower
from dropflow.backbone.vision_reader import VisionReader, listed_layers, one_to_one
from dropflow.backbone.wrapped import check_is_model, unwrapped
from dropflow.errors import UnknownName, UnsupportedModel, nearest, quoted
from dropflow.lifecycle.lazy import lazy
from dropflow.policy.registry import ADAPTERS, load, names
from dropflow.units import BackboneShape

MODALITIES = ("image", "video")
"""What a core encodes with `get_image_features` and `get_video_features`."""
FACTS = {
    "vision_layers": "the layers of the vision encoder, before which stages can work",
    "vision_attention": "the attention of the vision encoder, for every row that the LLM gets",
    "cls": "a CLS row in the vision encoder, whose attention ranks patches",
    "projector": "a projector that maps the patch rows of the features one by one",
    "sublayers": "the attention and feed-forward parts of a vision layer, between which stages can work",
    "units": "a packed vision tower, of whose merge units stages can leave some out",
    "grid": "the patch grid of every image",
    "final_norm": "the norm after the text decoder's last layer",
    "rotary": "the cos and sin with which every layer of the text decoder rotates q and k",
}
"""What a stage may need of a backbone, by name."""
FALLBACK = "auto"
"""Name of the adapter that serves models whose `model_type` no adapter claims."""


@dataclass(frozen=True)
class Sublayers:
    """The two residual branches of one layer of a vision encoder."""

    attention: Any
    """Module that returns a pair whose first part is added to the residual."""
    feed_forward: Any
    """Module whose output is added to the residual."""


@dataclass(frozen=True)
class VisionEncoder:
    """The part of the vision tower that `encode` stages may work inside."""

    owner: Any
    """Module whose `layers` attribute is iterated once per forward."""
    prefix: int
    """Tokens before the patches, such as 1 for a CLS token; they are never dropped."""
    has_cls: bool
    """Whether the first prefix token is a CLS token whose attention ranks patches."""
    feature_layer: int
    """Boundary whose tokens are handed to the projector: the output of layer `feature_layer - 1`."""
    select_prefix: int
    """Prefix tokens still present in the features handed to the projector."""
    projector: Any = None
    """Module that maps the features, patch rows only, one by one; `None` where there is no such module."""
    sublayers: Callable[[Any], Sublayers] | None = None
    """Attention and feed-forward module of a layer, for stages that work between the two; `None` where unknown."""

    @property
    def depth(self) -> int:
        """Layers of the encoder."""
        return len(listed_layers(self.owner, "layers"))


@dataclass(frozen=True)
class Projections:
    """The modules of one decoder layer that project normed hidden states to q, k and v, each with `out_features`."""

    query: Any
    """Returns q (..., heads * head_dim)."""
    key: Any
    """Returns k (..., kv_heads * head_dim)."""
    value: Any
    """Returns v (..., kv_heads * head_dim)."""

    @classmethod
    def of(cls, attention: Any) -> Projections:
        """Those of an attention module that has them under the names of Llama: `q_proj`, `k_proj` and `v_proj`."""
        return cls(attention.q_proj, attention.k_proj, attention.v_proj)


class Backbone:
    """One model, as the engine sees it. Subclass it per family and register it under the config's `model_type`.

    The defaults fit the three-level shape that transformers gives its vision-language models (head, core with
    `get_image_features`, text decoder with `layers`); a family overrides what differs.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    """Modalities with placeholder tokens, `image` or `video`; the config holds their ids as `<modality>_token_id`."""
    unstated_videos: ClassVar[frozenset[str]] = frozenset()
    """Modalities in which a call does not say which images are frames of which video, as where a processor hands over
    frames as images; stages that work on videos then need `dropflow.videos`."""
    token_arguments: ClassVar[Mapping[str, int]] = {}
    """Other per-token arguments of a decoder layer: name of the argument -> its token dimension, from the end
    (-1 for (..., tokens), -2 for (..., tokens, dim)). The engine already knows positions, masks and caches."""
    final_norm_name: ClassVar[str] = "norm"
    """Name of the text decoder's module after its last layer; `final_norm` is this module."""
    gridded: bool = False
    """Whether `layouts` gives every image a patch grid although images differ in size."""
    features_form: ClassVar[Literal["list", "tensor"] | None] = None
    """The form of `pooler_output` in which the core takes features: a list of (rows, dim) that it joins, or a tensor
    whose rows it takes in order. Only for cores that put these rows in the places of the placeholders and do nothing
    else with them, before a text decoder whose first layer receives its embeddings unchanged; the engine can then
    encode images beside the text layers (`overlap`). `None` for other cores."""
    bidirectional: ClassVar[Literal["images", "prompt"] | None] = None
    """Which tokens see later ones in the text decoder: those of images, of what belongs to images alone, so that they
    are the same for every question (prefixes); or those of a whole prompt. `None` where none do, or nobody knows."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def enclosing(self) -> Sequence[int]:
        """Ids of text tokens for which the core makes embeddings where a call brings images, as for those that enclose
        an image in Ovis 2: a question that has one cannot go on from a prefix. Empty where there are none."""
        return ()

    @property
    def core(self) -> Any:
        """The module that merges image features into the prompt and calls the text decoder."""
        return self.model.base_model

    @property
    def text(self) -> Any:
        """The text decoder whose `layers` attribute is iterated once per forward."""
        return self.model.get_decoder()

    @property
    def vision(self) -> VisionEncoder | None:
        """Where the vision encoder's layers are; `None` where stages cannot work inside it.

        They can where the encoder's rows reach the LLM one by one. They cannot where the projector pools or shuffles
        neighbours together, or where images are cut into tiles and joined again.
        """
        return None

    @lazy
    def mixers(self) -> tuple[Mixer, ...]:
        """What mixes the tokens of each decoder layer, from the config of the text decoder."""
        return mixers_of(self.text.config, self.text._modules.get("layers", ()))

    @property
    def place_scale(self) -> PlaceScale | None:
        """Decoder layers that scale queries by their place in a call; `None` where positions alone count."""
        return PlaceScale.of(self.text.config)

    def neutral_padding(self, layer: Any) -> bool:
        """Whether padding before a sample leaves the state of this recurrent layer empty.

        True where the layer zeroes padding and its input projection has no bias, which would fill it again.
        """
        inputs = (module for name, module in layer.named_modules() if name.split(".")[-1].startswith("in_proj"))
        return all(getattr(module, "bias", None) is None for module in inputs)

    @property
    def packed_tower(self) -> PackedTower | None:
        """The vision tower, where it runs all pictures as one sequence of patches; `None` for other towers.

        Stages can then leave whole units out of its run, before it (place `pixels`) or before one of its blocks.
        """
        return None

    def reader(self, modality: str = "image") -> VisionReader | None:  # noqa: ARG002
        """The tower that encodes a modality, so that stages after the projector can read its attention.

        `None` where it is unknown of which rows of the tower the LLM's rows are made. By default the encoder in
        `vision`, whose rows reach the LLM one by one.
        """
        encoder = self.vision
        if encoder is None:
            return None
        prefix, kept = encoder.prefix, encoder.select_prefix
        return VisionReader(
            encoder.owner,
            lambda sizes, _: one_to_one(sizes, prefix, kept),
            prefix=prefix,
            has_cls=encoder.has_cls,
            feature_layer=encoder.feature_layer,
        )

    def seen_states(self, hidden: Tensor) -> Float[Tensor, "batch tokens dim"]:
        """What stages see of the states that one decoder layer hands to the next; the same unless these are several."""
        return hidden

    def projections(self, layer: Any) -> Projections | None:  # noqa: ARG002
        """Where a decoder layer with attention projects q, k and v, so that ranking computes only what it reads.

        `None` (also right for a fused projection) makes the engine compute all three for all live tokens.
        """
        return None

    @property
    def final_norm(self) -> Callable[[Tensor], Tensor] | None:
        """The norm after the text decoder's last layer; `None` where the decoder has no module `final_norm_name`."""
        norm: Callable[[Tensor], Tensor] | None = self.text._modules.get(self.final_norm_name)
        return norm

    @property
    def linear_positions(self) -> bool:
        """Whether a token's position is one number, the same for all layers, so that positions can be renumbered."""
        parameters = getattr(self.text.config, "rope_parameters", None) or {}
        by_layer_type = any(isinstance(value, Mapping) for value in parameters.values())
        return "mrope_section" not in parameters and not by_layer_type

    def rotary(self, like: Tensor, position_ids: Int[Tensor, "batch tokens"]) -> Any:
        """What the text decoder passes its layers as `position_embeddings` for these positions, in `like`'s dtype."""
        return self.text.rotary_emb(like, position_ids)

    @property
    def rotates_pairs(self) -> bool:
        """Whether every layer rotates pairs of q and k by the cos and sin (batch, tokens, dims) that it receives.

        False by default where several kinds of layers share one RoPE, since in some such decoders one kind does not
        rotate at all; an adapter that knows its family overrides this.
        """
        config = self.text.config
        kinds = {mixer.name for mixer in self.mixers if mixer.kind == "attention"}
        parameters = getattr(config, "rope_parameters", None) or {}
        alike = len(kinds) < 2 or kinds <= parameters.keys()
        layer = self.text._modules["layers"][0]
        given = "position_embeddings" in inspect.signature(layer.forward).parameters
        return given and alike and not hasattr(config, "no_rope_layers")

    @property
    def shape(self) -> BackboneShape:
        """Depth of the text decoder and visual tokens of one image, if that is the same for all images."""
        return shape_of(self.mixers, self.tokens_per_image)

    @property
    def tokens_per_image(self) -> int | None:
        """Placeholders of one image, where every image has the same number."""
        return None

    @property
    def decoder_widths(self) -> DecoderWidths:
        """Widths of the text decoder, for FLOPs and KV bytes."""
        return DecoderWidths.of(self.text.config)

    @property
    def feature_width(self) -> int:
        """Numbers per row of the image features, as stages see them after the projector: the LLM's, unless a family
        projects them later."""
        return self.decoder_widths.hidden

    @property
    def work_without_attention(self) -> dict[int, int]:
        """Multiply-adds per token of every decoder layer without attention, by layer; an estimate from its weights."""
        shape, text = self.shape, self.text
        layers = list(text._modules["layers"]._modules.values())
        return {
            number: flops.without_attention(layers[number], text.config)
            for number in range(shape.layers)
            if not shape.attends(number)
        }

    @property
    def visual_ids(self) -> dict[str, int]:
        """Modality -> id of its placeholder token."""
        found = {name: getattr(self.model.config, f"{name}_token_id", None) for name in self.modalities}
        return {name: int(token) for name, token in found.items() if token is not None}

    def placeholders(
        self, input_ids: Int[Tensor, "batch tokens"], modality: str | None = None
    ) -> Bool[Tensor, "batch tokens"]:
        """Which tokens of the prompt stand for image features, of one modality or of any."""
        ids = [token for name, token in self.visual_ids.items() if modality in (None, name)]
        found = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in ids:  # not `isin`, whose second tensor would be copied from the host
            found |= input_ids == token
        return found

    def embedded_placeholders(self, inputs_embeds: Tensor, modality: str | None = None) -> Bool[Tensor, "batch tokens"]:
        """Which tokens of a prompt given as embeddings (batch, tokens, dim) equal a placeholder's embedding."""
        table = self.model.get_input_embeddings()
        found = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        for name, token in self.visual_ids.items():
            if modality in (None, name) and token < table.num_embeddings:
                embedded: Tensor = table(torch.tensor(token, device=inputs_embeds.device))
                found |= (inputs_embeds == embedded).all(-1)
        return found

    def pixels_in(self, arguments: Mapping[str, Any]) -> frozenset[str]:
        """Names of the arguments of a call of the core that hold pixels."""
        return frozenset(
            name
            for name, value in arguments.items()
            if value is not None and (name.startswith("pixel_values") or name == "image_patches")
        )

    def modalities_in(self, arguments: Mapping[str, Any]) -> frozenset[str]:
        """Modalities whose features or pixels are among the arguments of a call of the core."""
        encoded = arguments.get("mm_encoder_outputs") or {}
        found = {modality for modality, value in encoded.items() if value is not None}
        found |= {"video" if name == "pixel_values_videos" else "image" for name in self.pixels_in(arguments)}
        return frozenset(found)

    def has_images(self, arguments: Mapping[str, Any]) -> bool:
        """Whether features or pixels of any modality are among the arguments of a call of the core."""
        return bool(self.modalities_in(arguments))

    def grid(self, tokens: int) -> tuple[int, int] | None:  # noqa: ARG002
        """Patch grid (rows, columns) of an image of `tokens` tokens; `None` where the number does not determine it."""
        return None

    def layouts(
        self,
        modality: str,  # noqa: ARG002
        sizes: Sequence[int],
        arguments: Mapping[str, Any],  # noqa: ARG002
    ) -> list[list[ImageLayout]]:
        """The images (pictures, tiles, frames) inside each entry of the features that the core encodes.

        `sizes` counts the rows of each entry. `arguments` are those of `get_image_features` or `get_video_features`;
        empty where the features were encoded elsewhere. By default every entry is one image.
        """
        return [[ImageLayout(size, self.grid(size))] for size in sizes]

    def video_lengths(self, entries: Sequence[int], arguments: Mapping[str, Any]) -> Sequence[int] | None:  # noqa: ARG002
        """How many frames each video of a call has, in the order of its features; by default each entry is a video.

        `entries` counts the images in each entry of the features, `arguments` are those of `get_video_features`; `None`
        where these do not say, as where features were encoded elsewhere. Not asked for a modality in
        `unstated_videos`.
        """
        return entries

    @property
    def deepstack_levels(self) -> int:
        """Number of `deepstack_features` that come with the features of images; 0 where there are none."""
        return 0

    def deepstack_residuals(
        self, arguments: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[tuple[Tensor, Tensor], ...]]:
        """What the text decoder adds to visual states after its first layers, taken out of its arguments.

        Returns the arguments without it and, per layer, a boolean (batch, tokens) of the tokens that receive rows, and
        these rows (visual tokens, dim). The default knows the two arguments in which transformers passes them.
        """
        rows, where = arguments.get("deepstack_visual_embeds"), arguments.get("visual_pos_masks")
        if rows is None or where is None:
            return dict(arguments), ()
        return {**arguments, "deepstack_visual_embeds": None}, tuple((where, own) for own in rows)

    def facts(self) -> frozenset[str]:
        """Which of the facts in `FACTS` this backbone provides."""
        vision, known = self.vision, set()
        if vision is not None:
            found = {"vision_layers": True, "cls": vision.has_cls, "projector": vision.projector is not None}
            found["sublayers"] = vision.sublayers is not None
            known |= {fact for fact, given in found.items() if given}
        if self.packed_tower is not None:
            known.add("units")
        readers = [self.reader(modality) for modality in self.modalities]
        if all(reader is not None for reader in readers):
            known.add("vision_attention")
            if all(reader is not None and reader.has_cls for reader in readers):
                known.add("cls")
        if self.final_norm is not None:
            known.add("final_norm")
        if self.rotates_pairs:
            known.add("rotary")
        fixed = self.tokens_per_image
        if self.gridded or (fixed is not None and self.grid(fixed) is not None):
            known.add("grid")
        return frozenset(known)


def square_grid(tokens: int) -> tuple[int, int] | None:
    """Square grid of `tokens` patches; `None` for a number that is not a square."""
    if not isinstance(tokens, int) or tokens < 0:
        raise ValueError(f"square_grid: expected a number of tokens (an integer from 0), got {quoted(tokens)}")
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def backbone_for(model: Any, adapter: str | type[Backbone] | None = None) -> Backbone:
    """Wrap a model in its adapter: a class, a registered name, or by default the name that is its `model_type`.

    A model whose type no adapter claims is served by the one registered as `auto`, if it has the usual shape. For a
    model wrapped by torch.compile, PEFT or DistributedDataParallel, the adapter is that of the model inside; either
    may then be called. Raises `UnsupportedModel` with the reason for a model that is not supported, and with what to
    pass instead for an object that contains or accompanies a model, such as a pipeline or a processor.
    """
    model = unwrapped(model)
    check_adapter(adapter)
    if isinstance(adapter, type):
        return adapter(model)
    check_is_model(model)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    known = names(ADAPTERS)
    if adapter is None and kind not in known and FALLBACK not in known:
        raise UnsupportedModel(
            f"no adapter for a model of type {kind!r}; {nearest(kind, known)} "
            "Pass `adapter=` with a name or a Backbone subclass (see docs/write-an-adapter.md)"
        )
    backbone: Backbone = load(ADAPTERS, adapter or (kind if kind in known else FALLBACK))(model)
    if adapter is not None:
        try:
            backbone.facts()
        except AttributeError as error:
            raise UnsupportedModel(
                f"adapter: {adapter!r} does not fit {type(model).__name__} ({error}); leave it out to use the one for "
                "the model's `model_type`"
            ) from error
    return backbone


def check_adapter(adapter: Any) -> None:
    """Refuse anything but a registered name, a `Backbone` subclass and `None`."""
    if adapter is None or (isinstance(adapter, type) and issubclass(adapter, Backbone)):
        return
    if not isinstance(adapter, str):
        raise UnsupportedModel(f"adapter: expected a registered name or a Backbone subclass, got {quoted(adapter)}")
    known = names(ADAPTERS)
    if adapter not in known:
        raise UnknownName(f"adapter: no adapter named {quoted(adapter)}; {nearest(adapter, known)}")

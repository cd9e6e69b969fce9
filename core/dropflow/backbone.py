"""What a backbone adapter says: where a model's parts are and which of its tokens are visual, never what to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from dropflow.errors import UnsupportedModel, nearest
from dropflow.flops import TextShape
from dropflow.registry import ADAPTERS, load, names
from dropflow.units import Shape


@dataclass(frozen=True)
class VisionEncoder:
    """The part of the vision tower that `encode` stages may work inside of."""

    owner: Any
    """Module whose `layers` attribute is iterated once per forward."""
    prefix: int
    """Tokens in front of the patches, such as 1 for a CLS token; they are never dropped."""
    has_cls: bool
    """Whether the first prefix token is a CLS token whose attention ranks patches."""
    feature_layer: int
    """Boundary whose tokens are handed to the projector: the output of layer `feature_layer - 1`."""
    select_prefix: int
    """Prefix tokens still present in the features handed to the projector."""

    @property
    def depth(self) -> int:
        """Layers of the encoder."""
        return len(self.owner._modules["layers"])


@dataclass(frozen=True)
class Projections:
    """The modules of one decoder layer that project normed hidden states to q, k and v, each with `out_features`."""

    query: Any
    key: Any
    value: Any


class Backbone(ABC):
    """One model, as the engine sees it. Subclass it per family and register it under the config's `model_type`.

    The defaults fit the three-level shape that transformers gives its vision-language models (head, core with
    `get_image_features`, text decoder with `layers`); a family overrides what differs.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

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
        """Where the vision encoder's layers are; `None` where stages cannot work inside it."""
        return None

    def projections(self, layer: Any) -> Projections | None:  # noqa: ARG002
        """Where a decoder layer projects q, k and v, so that ranking computes only what it reads.

        `None` (also right for a fused projection) makes the engine compute all three for all live tokens.
        """
        return None

    @property
    def linear_positions(self) -> bool:
        """Whether a token's position is one number, the same for all layers, so that positions can be renumbered."""
        parameters = getattr(self.text.config, "rope_parameters", None) or {}
        by_layer_type = any(isinstance(value, Mapping) for value in parameters.values())
        return "mrope_section" not in parameters and not by_layer_type

    def rotary(self, like: Tensor, position_ids: Int[Tensor, "batch tokens"]) -> Any:
        """What the text decoder hands its layers as `position_embeddings`, for these positions, in dtype of `like`."""
        return self.text.rotary_emb(like, position_ids)

    @property
    def shape(self) -> Shape:
        """Depth of the text decoder and visual tokens of one image, if that is the same for all images."""
        return Shape(layers=self.text.config.num_hidden_layers, visual_tokens=self.tokens_per_image)

    @property
    def tokens_per_image(self) -> int | None:
        """Placeholders of one image, where every image has the same number."""
        return None

    @property
    def text_shape(self) -> TextShape:
        """Widths of the text decoder, for FLOPs and KV bytes."""
        return text_shape(self.text.config)

    @abstractmethod
    def placeholders(self, input_ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Which tokens of the prompt stand for image features."""

    def embedded_placeholders(self, inputs_embeds: Tensor) -> Bool[Tensor, "batch tokens"] | None:  # noqa: ARG002
        """The same for a prompt given as embeddings (batch, tokens, dim); `None` where it cannot be told."""
        return None

    def has_images(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call of the core brings image features of its own."""
        encoded = arguments.get("mm_encoder_outputs") or {}
        return any(value is not None for value in encoded.values()) or any(
            value is not None for key, value in arguments.items() if key.startswith("pixel_values")
        )

    def grid(self, tokens: int) -> tuple[int, int] | None:  # noqa: ARG002
        """Patch grid (rows, columns) of an image of `tokens` tokens; `None` where there is none."""
        return None

    def facts(self) -> frozenset[str]:
        """The facts this backbone can give: `vision_layers`, `cls`, `grid`."""
        vision, known = self.vision, set()
        if vision is not None:
            known |= {"vision_layers", "cls"} if vision.has_cls else {"vision_layers"}
        if self.tokens_per_image is not None and self.grid(self.tokens_per_image) is not None:
            known.add("grid")
        return frozenset(known)


def text_shape(config: Any) -> TextShape:
    """Widths of a text decoder from its transformers config."""
    heads = config.num_attention_heads
    return TextShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
    )


def backbone_for(model: Any, adapter: str | type[Backbone] | None = None) -> Backbone:
    """Wrap a model in its adapter: a class, a registered name, or by default the name that is its `model_type`.

    Raises `UnsupportedModel` for a model no adapter knows.
    """
    if isinstance(adapter, type):
        return adapter(model)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    known = names(ADAPTERS)
    if adapter is None and kind not in known:
        raise UnsupportedModel(
            f"no adapter for a model of type {kind!r}; {nearest(kind, known)} "
            "Pass `adapter=` with a name or a Backbone subclass (see CONTRIBUTING.md, 'Add an adapter')"
        )
    backbone: Backbone = load(ADAPTERS, adapter or kind)(model)
    return backbone

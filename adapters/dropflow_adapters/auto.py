"""Fallback adapter for models of the usual shape that have no adapter; facts that cannot be known are absent."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from dropflow import Backbone
from dropflow.errors import UnsupportedModel

CROSS = {"cross_attn", "crossattention", "encoder_attn"}
"""Names of modules with which the layers of a decoder read images."""


class Auto(Backbone):
    """A core with `get_image_features` and a text decoder with `layers`, found by transformers' own accessors.

    Every entry of the image features is one image. Patch grid, CLS row and vision layers are absent, so a stage that
    needs one is refused. Raises `UnsupportedModel`, with the reason, for models that keep visual tokens elsewhere.
    """

    modalities = ("image", "video")
    unstated_videos = frozenset({"image", "video"})

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        reason = self._misfit()
        if reason is not None:
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise UnsupportedModel(
                f"no adapter for a model of type {kind!r}, and `auto` cannot serve it: {reason}. "
                "Pass `adapter=` with a name or a Backbone subclass (see docs/write-an-adapter.md)"
            )

    @property
    def text(self) -> Any:
        """The text decoder: the first module with `layers` in what `get_decoder` returns, which may be a model."""
        decoder = self.model.get_decoder()
        return next((part for part in decoder.modules() if "layers" in part._modules), decoder)

    def _misfit(self) -> str | None:
        """Why the model does not have the usual shape; `None` if it does."""
        config = getattr(self.model, "config", None)
        if config is None or not hasattr(self.model, "get_decoder"):
            return "it is not a transformers model with a text decoder"
        if config.is_encoder_decoder:
            return "it is an encoder-decoder, whose visual tokens are not in the decoder's sequence"
        inside = {name.split(".")[-1] for name, _ in self.text.named_modules()}
        if any("CrossAttention" in type(part).__name__ for part in self.text.modules()) or inside & CROSS:
            return "its decoder reads images by cross-attention, so visual tokens are not in the decoder's sequence"
        if not hasattr(self.core, "get_image_features"):
            return "its core has no `get_image_features`, so images do not become tokens of the prompt there"
        if "layers" not in self.text._modules:
            return "its text decoder has no `layers` list"
        if self.text is self.core:
            return "its core is the text decoder itself, so that images become tokens while the decoder already runs"
        if self._hands_embeddings_on():
            return "its own `generate` hands embeddings to a text model inside it, which cannot tell images from text"
        deepstack = {name for name in inspect.signature(self.text.forward).parameters if "deepstack" in name}
        if deepstack - {"deepstack_visual_embeds"}:
            return f"its text decoder adds features of images between layers by `{deepstack.pop()}`, unknown to `auto`"
        if not self.visual_ids:
            return "its config has no `image_token_id`, so visual tokens cannot be identified"
        return None

    def _hands_embeddings_on(self) -> bool:
        """Whether the model generates by a way of its own, and another model that generates is inside it."""
        own = getattr(type(self.model), "generate", None) is not GenerationMixin.generate
        parts = (part for part in self.model.modules() if isinstance(part, PreTrainedModel) and part is not self.model)
        return own and any(part.can_generate() for part in parts)

"""Tiny random models and prompts for them: what a family must provide for the conformance kit to run on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dropflow.backbone.image_layout import ImageLayout

PAD, BOS, EOS, START, END, VIDEO, IMAGE = 0, 1, 2, 90, 91, 97, 98
"""Token ids of the tiny vocabulary; 3..89 are words, `START` and `END` may enclose an image."""
VOCABULARY = 99
TEXT: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
"""Sizes of a tiny text decoder, under the names that most configs use."""
VISION: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
"""Sizes of a tiny vision encoder, under the names that most configs use."""
Part = int | Literal["I", "V"]
"""A part of a prompt: that many text tokens, an image, or a video."""
SAMPLES: Sequence[Sequence[Part]] = ((3, "I", 5), (1, "I", 2, "I", 10), (4,))
"""Samples with one image, two images, and none; the first is padded by an odd number where images have an even one."""


@dataclass(frozen=True)
class Picture:
    """What one image or video adds to a prompt, and what an adapter must state about it."""

    ids: Sequence[int]
    """Its token ids, including those that enclose or divide it."""
    arguments: Mapping[str, Tensor]
    """Its arguments of the model; those of all pictures are concatenated along the first dimension."""
    layouts: Sequence[ImageLayout]
    """The images in it, with their true grids (`None` where an adapter cannot know)."""


MakePicture = Callable[[int, torch.Generator], Picture]
"""Makes the picture with a given number (0, 1, ...), so that pictures can differ in size."""


@dataclass(frozen=True)
class Tiny:
    """A model family in miniature."""

    build: Callable[[], Any]
    """Builds the model from config classes; its weights are then replaced by seeded ones."""
    pictures: Mapping[str, MakePicture]
    """Modality (`image`, `video`) -> the function that makes its pictures."""
    finish: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda inputs: inputs)
    """Adds to the inputs what the processor would add, such as token types."""
    tolerance: float = 1e-5
    """Largest allowed relative error of states, logits and losses: the round-off of the family's kernels."""
    gradient_tolerance: float = 1e-3
    """The same for gradients."""
    mixes: bool = True
    """Whether one call can bring images and videos."""
    silent: Sequence[int] = (IMAGE, VIDEO)
    """Tokens that a random model must not generate, since they mean something only in a prompt."""

    def model(self, attention: str = "sdpa", seed: int = 0) -> Any:
        """The model in eval mode, with weights large enough to make attention uneven."""
        torch.manual_seed(seed)
        model = self.build().eval()
        model.set_attn_implementation(attention)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    fan_in = weight.shape[-1] if weight.dim() == 2 else weight[0].numel()
                    weight.normal_(0, 0.3 if "embed_tokens" in name else 1.2 * fan_in**-0.5)
                elif name.endswith("bias"):  # or else a bias that enters where it must not would not be seen
                    weight.normal_(0, 0.1)
        model.generation_config.suppress_tokens = list(self.silent)
        return model

    def prompt(
        self, samples: Sequence[Sequence[Part]] = SAMPLES, *, side: str = "left", seed: int = 1
    ) -> tuple[dict[str, Any], list[list[Picture]]]:
        """The inputs of a padded batch, and the pictures of every sample in order."""
        dice, number = torch.Generator().manual_seed(seed), 0
        rows: list[list[int]] = []
        shown: list[list[Picture]] = []
        for parts in samples:
            row, own = [BOS], []
            for part in parts:
                if isinstance(part, int):
                    row += torch.randint(3, START, (part,), generator=dice).tolist()
                else:
                    own.append(self.pictures["video" if part == "V" else "image"](number, dice))
                    row += own[-1].ids
                    number += 1
            rows.append(row)
            shown.append(own)
        return self.collate(rows, shown, side), shown

    def collate(self, rows: Sequence[list[int]], shown: Sequence[Sequence[Picture]], side: str) -> dict[str, Any]:
        """Pad the token ids and concatenate the pictures' arguments."""
        longest = max(map(len, rows))
        pads = [[PAD] * (longest - len(row)) for row in rows]
        ids = torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])
        real = [
            [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
            for r, p in zip(rows, pads, strict=True)
        ]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.tensor(real)}
        arguments: dict[str, list[Tensor]] = {}
        for picture in (picture for own in shown for picture in own):
            for name, value in picture.arguments.items():
                arguments.setdefault(name, []).append(value)
        return self.finish(inputs | {name: torch.cat(values) for name, values in arguments.items()})


def pixels(dice: torch.Generator, *shape: int) -> Tensor:
    """Random pixel values."""
    return torch.randn(*shape, generator=dice)


def square_pictures(size: int, tokens: int, *, enclosed: bool = True, gridded: bool = True) -> MakePicture:
    """Pictures of size x size pixels that become `tokens` placeholders each."""
    side = int(tokens**0.5)

    def make(_: int, dice: torch.Generator) -> Picture:
        ids = [IMAGE] * tokens
        layout = ImageLayout(tokens, (side, side) if gridded else None)
        return Picture(
            [START, *ids, END] if enclosed else ids, {"pixel_values": pixels(dice, 1, 3, size, size)}, [layout]
        )

    return make

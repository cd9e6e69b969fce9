"""A tiny random CLIP in a folder, with a tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

LONG = ("a", "b", "c", "d", "e", "f", "g", "how", "many", "dogs")
WORDS = ["[UNK]", *LONG, "what", "colour", "is", "the", "bus", "who", "<s>", "</s>"]
"""All words by id; the last one ends a text, as the largest id does in the published CLIP."""


def save_clip(folder: Path, width: int) -> str:
    """Save a CLIP whose vision tower is so wide, whose joint space has 12 dimensions, and which reads nine tokens."""
    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 12}
    ends = {"bos_token_id": WORDS.index("<s>"), "eos_token_id": 2}  # 2 is what the published config says, too
    text = sizes | ends | {"hidden_size": 24, "vocab_size": len(WORDS), "max_position_embeddings": 9}
    vision = sizes | {"hidden_size": width, "image_size": 24, "patch_size": 6}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # large enough for the end token to differ with what it has read
                weight.normal_(0, 0.8)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, WORDS.index(word)) for word in ("<s>", "</s>")]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return str(folder)

"""The demo model: a stock LLaVA of 2.8 M parameters, its processor, and the shipped checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dropflow_lab.digits.data.questions import VOCABULARY
from dropflow_lab.digits.data.scenes import CANVAS, PATCH
from dropflow_lab.files import replacing_files

PIXEL_MEAN = (0.3, 0.3, 0.3)
PIXEL_STD = (0.25, 0.25, 0.25)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' ' + message['role'] + ' :' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' <image>' }}{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant :' }}{% endif %}"
)


def build_config(decoder_layers: int = 12, words: Sequence[str] = VOCABULARY, side: int = CANVAS) -> LlavaConfig:
    """Return the configuration: CLIP 96 wide x 4 layers, Llama 128 wide x `decoder_layers`.

    `words` are those of its prompts, `side` is the width and height of its pictures in pixels.
    """
    ids = {word: i for i, word in enumerate(words)}
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=side,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=decoder_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<image>"],
        image_seq_length=(side // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build_model(
    seed: int = 0, decoder_layers: int = 12, words: Sequence[str] = VOCABULARY, side: int = CANVAS
) -> LlavaForConditionalGeneration:
    """Return the untrained model in float32; leaves the global random state unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config(decoder_layers, words, side))
    config = model.generation_config
    config.pad_token_id = VOCABULARY.index("<pad>")
    config.bos_token_id = VOCABULARY.index("<s>")
    config.eos_token_id = VOCABULARY.index("</s>")
    return model


def build_processor(
    words: Sequence[str] = VOCABULARY, side: int = CANVAS, template: str = CHAT_TEMPLATE
) -> LlavaProcessor:
    """Return the processor: word-level lower-cased tokenizer padded on the left, PIL image processor."""
    level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    level.normalizer = normalizers.Lowercase()
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=level,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )


def export(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Write model and processor to `path` as bf16 safetensors that everyone may read."""
    saved = copy.deepcopy(model).to(torch.bfloat16)
    saved.set_attn_implementation("sdpa")
    with replacing_files(path) as part:
        build_processor().save_pretrained(part)
        saved.save_pretrained(part)


def _checkpoints() -> Path:
    return Path(str(resources.files(__package__)))


def checkpoint_names() -> list[str]:
    """Return the names of the shipped checkpoints."""
    return sorted(folder.name for folder in _checkpoints().iterdir() if (folder / "config.json").is_file())


def checkpoint_path(name: str = "dense") -> Path:
    """Return the folder of the shipped checkpoint `name`; raise `LookupError` naming the available ones."""
    known = checkpoint_names()
    if (_checkpoints() / name / "change.safetensors").is_file():
        how = f"dropflow_lab.inputs.models.load_model(Path({name!r}))"
        raise LookupError(
            f"{name!r} has no folder of its own, since it is stored as a change to `dense`; load it by {how}"
        )
    if name not in known:
        raise LookupError(f"expected one of the shipped checkpoints {', '.join(known)}, got {name!r}")
    return _checkpoints() / name


def load(
    name: str | Path = "dense", dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a shipped checkpoint by name, or any folder by path, without touching the network."""
    path = name if isinstance(name, Path) else checkpoint_path(name)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, local_files_only=True)
    processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    return model.eval(), processor


def sample_image() -> Image.Image:
    """Return the sample picture that comes with the package, a scene of the test split (RGB, 96 x 96)."""
    with resources.as_file(resources.files("dropflow_lab.digits.data") / "samples" / "scene.png") as path:
        return Image.open(path).convert("RGB")

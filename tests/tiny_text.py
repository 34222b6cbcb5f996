"""Tiny random T5 and CLIP folders, tokenizers included, as transformers writes them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from models import T5Clip

WORDS = ("a", "red", "blue", "circle", "square", "moving", "left")
WIDTH, POOLED = 8, 12
NUM_TOKENS, NUM_CLIP_TOKENS = 10, 9


def tiny_t5_clip(folder: Path, seed: int = 0) -> T5Clip:
    """Both folders, and the record that names them; one token a word, then the end token."""
    _write_t5(folder / "t5", seed)
    _write_clip(folder / "clip", seed)
    return T5Clip(
        t5=str(folder / "t5"),
        clip=str(folder / "clip"),
        tokens=NUM_TOKENS,
        clip_tokens=NUM_CLIP_TOKENS,
        t5_width=WIDTH,
        pooled=POOLED,
        dtype="float32",
    )


def change_weights(folder: Path) -> None:
    """Another value in the first tensor of the folder's weights."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The library fills its models from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _write_t5(folder: Path, seed: int) -> None:
    config = T5Config(
        vocab_size=3 + len(WORDS),
        d_model=WIDTH,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    with _seeded(seed):
        T5EncoderModel(config).save_pretrained(folder)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_tokenizer(folder, ["<pad>", "</s>", "<unk>", *WORDS], "$A </s>", special)


def _write_clip(folder: Path, seed: int) -> None:
    num_words = len(WORDS)
    config = CLIPTextConfig(
        vocab_size=num_words + 3,
        hidden_size=POOLED,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=NUM_CLIP_TOKENS,
        bos_token_id=num_words + 1,
        eos_token_id=num_words + 2,
        pad_token_id=num_words + 2,
    )
    with _seeded(seed):
        CLIPTextModel(config).save_pretrained(folder)
    # As published: padding is the end token again.
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    _write_tokenizer(folder, [*WORDS, "<unk>", "<s>", "</s>"], "<s> $A </s>", special)


def _write_tokenizer(folder: Path, words: list[str], form: str, special: dict[str, str]) -> None:
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(word, numbers[word]) for word in form.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=marks)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

"""Tiny random models: real architectures, a few thousand weights, so that mechanics are tested in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import PreTokenizer, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gpt2.models.loading import LoadedModel, wrap

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GQA = SHAPE | {"num_key_value_heads": 2}

# Family to config: grouped queries, windows, head_dim apart from hidden / heads, learned and rotary positions
FAMILIES = {
    "llama": GQA,
    "qwen2": GQA,
    "qwen3": GQA | {"head_dim": 16},
    "mistral": GQA | {"sliding_window": 8},
    "gemma3_text": GQA | {"head_dim": 20, "sliding_window": 8},
    "gpt2": {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 512, "bos_token_id": 1,
             "eos_token_id": None, "pad_token_id": 0},
    "phi": GQA,
    "opt": SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "gpt_neox": SHAPE,
}  # fmt: skip


def tiny_model(family: str = "llama", seed: int = 0, **overrides):
    """A random model of a family, float32, in evaluation mode.

    With the default initialization, or with the output tied to the input embedding, every position predicts the same
    token whatever the cache holds; these weights make greedy decoding wander (test_generation proves it).
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **FAMILIES.get(family, {}) | {"tie_word_embeddings": False} | overrides)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def _tokenizer(tokens: Iterable[str], splitting: PreTokenizer, **parts) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", *tokens])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = splitting
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<pad>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word `w2` … `w96`; the rest is unknown."""
    return _tokenizer((f"w{i}" for i in range(2, 97)), WhitespaceSplit())


def char_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of ASCII, for texts with names and numbers; as many ids as the tiny models have."""
    characters = ["\n", *map(chr, range(ord(" "), ord("~")))]
    return _tokenizer(characters, Split(Regex(r"[\s\S]"), "isolated"), decoder=Fuse())


def tokenizer_of(characters: str, start: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """One token per character, and none for a character that it doesn't know; `start` comes before every text."""
    vocabulary = {token: i for i, token in enumerate([*([start] if start else []), *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex(r"[\s\S]"), "isolated"), Fuse()
    if start:
        tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
        special["bos_token"] = start
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_loaded(family: str = "llama", tokenizer=None, **overrides) -> LoadedModel:
    """A tiny model as `gpt2.models.load` returns it, with a tokenizer of words unless given."""
    return wrap(tiny_model(family, **overrides), tokenizer or word_tokenizer(), f"tiny-{family}")


def longrope(switch: int) -> LoadedModel:
    """A tiny model with random weights whose rotary factors are others for texts of more than `switch` tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    config = AutoConfig.for_model("phi3", **GQA, rope_parameters=rope, original_max_position_embeddings=switch)
    return wrap(AutoModelForCausalLM.from_config(config).eval(), word_tokenizer(), "phi3")


def save_tiny(folder: Path, family: str = "llama", tokenizer=None, model=None, **overrides) -> Path:
    """A folder with a tiny model, or the one given, and a tokenizer of words unless given."""
    (model or tiny_model(family, **overrides)).save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder


def word_text(words: int, seed: int = 0) -> str:
    """Random words of the tiny vocabulary, ten a line."""
    ids = windows(1, words, seed)[0].tolist()
    return "\n".join(" ".join(f"w{i}" for i in ids[a : a + 10]) for a in range(0, words, 10))


def windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token windows of the tiny vocabulary, [count, length]."""
    return torch.randint(2, 97, (count, length), generator=torch.Generator().manual_seed(seed))


def write_shape(path: Path, family: str = "llama", **changes) -> Path:
    """A shape file of a tiny model's config, without weights."""
    path.write_text(json.dumps({"model_type": family, **FAMILIES[family], **changes}))
    return path

"""Small helpers for tests of what users have reported."""

import torch
from tiny import tiny_model
from torch import Tensor

from gpt2.compression.attention import enable_compressed_attention


def enabled(model, direct: bool = True):
    return enable_compressed_attention(model) if direct else model


def logits(model, cache, *parts: Tensor) -> Tensor:
    return torch.cat([model(x, past_key_values=cache).logits for x in parts], dim=1)


def lost(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def bloom():
    """A model whose keys have no positions."""
    return tiny_model("bloom", vocab_size=97, hidden_size=48, n_layer=2, n_head=4, tie_word_embeddings=True)

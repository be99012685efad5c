"""Small helpers for tests of what users have reported."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

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
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=48, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10)
    return model

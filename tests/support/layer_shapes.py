"""Models whose layers differ: in shape, in whether they keep K and V, in windows; calibrations of them, and vectors."""

from __future__ import annotations

import functools

import torch
from calibrations import SINKS, TEXT
from tiny import windows, word_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.statistics import tapped
from gpt2.compression.codecs import Compressor
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.loading import LoadedModel, wrap

COMMON = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    "tie_word_embeddings": False, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
CONFIGS = {
    # K is a latent of 16 channels, V the rotary key of 8
    "deepseek_v3": {
        "num_hidden_layers": 3, "first_k_dense_replace": 3, "num_key_value_heads": 4, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
    # K is wider than V, and some layers have more heads
    "mimo_v2_flash": {
        "num_hidden_layers": 2, "head_dim": 24, "v_head_dim": 16, "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    # The last two layers read K and V of the first two
    "gemma4_text": {
        "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": 16, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
    },
}  # fmt: skip
MODELS = ("gemma4_text", "qwen3_next", "inkling_text", "mimo_v2_flash", "deepseek_v3")
ONE_SHAPE = ("gemma4_text", "qwen3_next", "inkling_text")  # K and V of every layer have the same


@functools.cache
def model_of(family: str) -> LoadedModel:
    if family not in CONFIGS:
        return wrap(tiny_family(family), word_tokenizer(), family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON | CONFIGS[family]))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.2)
    return wrap(model, word_tokenizer(), family)


@functools.cache
def made(family: str) -> Calibration:
    return calibrate(model_of(family), TEXT, rank=4, codec="fisher", samples=2, seq_len=150)


@functools.cache
def vectors(family: str) -> dict[int, tuple[Tensor, Tensor]]:
    """K and V of each layer that has any, [1, H, 128, d] from position 4 on."""
    found = {}

    def record(layer: int, k: Tensor, v: Tensor) -> None:
        found[layer] = k[:, :, SINKS : SINKS + 128], v[:, :, SINKS : SINKS + 128]

    loaded = model_of(family)
    with torch.no_grad():
        loaded.model.base_model(input_ids=windows(1, 140), past_key_values=tapped(loaded.model, record))
    return found


def shapes_of(parts) -> list:
    return [None if part is None else tuple(part.shape) for part in parts]


def lost(compressor: Compressor, x: Tensor) -> float:
    """Relative error of x [1, H, T, d] compressed and reconstructed."""
    back = compressor.reconstruct(compressor.compress(x, SINKS), x.shape[-1], x.dtype, SINKS)
    assert back.shape == x.shape
    return float((back - x).norm() / x.norm())

"""Miniatures of families with a layer of each kind, with caches of transformers and of ours for them."""

from __future__ import annotations

import functools

import torch
from tiny import tiny_loaded, windows, word_tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, cache_utils

from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel, wrap
from gpt2.models.probe import probe_geometry

WINDOW = 130  # of the miniatures' sliding layers; smaller ones are stored exactly
LENGTH = 140  # tokens of a prompt: the window has forgotten its first
STEPWISE = {"qwen4_exp_text": 40}  # most tokens of a family without a window that goes through them one by one
# Family to the kinds of layers that it is here for
KINDS = {
    "gemma3_text": "sliding and full attention",
    "mistral": "sliding attention in all layers",
    "llama4_text": "chunked attention",
    "qwen3_next": "linear attention with recurrent states, full attention",
    "lfm2": "convolution states alone, full attention",
    "falcon_h1": "full and linear attention in one layer",
    "inkling_text": "sliding and linear attention in one layer, several states",
    "gemma4_text": "layers that read K and V of others, and layers of different shapes",
    "gemma3n_text": "layers that read K and V of others",
    "deepseek_v3": "latent attention",
    "mimo_v2_flash": "K wider than V, and layers of different shapes",
    "qwen4_exp_text": "an indexer beside attention, and linear attention",
    "glm_moe_dsa": "an indexer beside latent attention",
}
if not hasattr(cache_utils.DynamicIndexedLayer(), "indexer_position_ids"):
    # Older transformers keep its positions beside the layers, where no operation finds them
    del KINDS["qwen4_exp_text"]
# Their states can't be put back
RECURRENT = tuple(family for family in ("qwen3_next", "falcon_h1", "qwen4_exp_text") if family in KINDS)
WINDOWED = ("gemma3_text", "mistral", "llama4_text", "inkling_text", "gemma4_text", "gemma3n_text", "mimo_v2_flash")

SLIDING_FIRST = {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
# Models with a tokenizer of words, as scripts load them: their layers are alike, or differ in kind or in shape
MODELS = {
    "alike": tiny_loaded,
    "windowed": lambda: tiny_loaded("gemma3_text", **SLIDING_FIRST),
    "hybrid": lambda: miniature("qwen3_next"),
    "shapes": lambda: miniature("mimo_v2_flash"),
}

model_of = functools.cache(tiny_family)


def miniature(family: str) -> LoadedModel:
    return wrap(tiny_family(family), word_tokenizer(), f"tiny-{family}")


@functools.cache
def geometry_of(family: str) -> Geometry:
    return probe_geometry(model_of(family), family)


def ours(family: str) -> CompressedDynamicCache:
    """A cache of ours that loses nothing."""
    return identity_cache(geometry_of(family))


def theirs(family: str) -> DynamicCache:
    return DynamicCache(config=model_of(family).config)


def ids_of(length: int = LENGTH, batch: int = 1, seed: int = 0) -> Tensor:
    return windows(batch, length, seed)


def cut(family: str, ids: Tensor) -> Tensor:
    """Token ids [B, T], fewer of them for a family that takes long and loses nothing by it."""
    return ids[:, : STEPWISE.get(family)]


@torch.no_grad()
def feed(model: PreTrainedModel, cache, ids: Tensor) -> Tensor:
    """Logits of more tokens."""
    return model(ids, past_key_values=cache, use_cache=True).logits

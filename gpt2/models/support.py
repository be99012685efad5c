"""Which models can't be compressed, and why: known before any weight is read."""

from __future__ import annotations

import sys

import transformers
from transformers import DynamicCache, PreTrainedModel

from gpt2.common.errors import UnsupportedModel

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
MOST_LAYERS = 1024  # beyond any model's: a config of a few bytes can't keep a machine busy with laying out millions
SUPPORTED = "supported: decoder-only models whose layers all keep one K and one V per KV head"


def refuse_unsupported(config, spec: str, model: PreTrainedModel | None = None) -> None:
    """Raise UnsupportedModel, with the reason, for caches that aren't one K and one V per layer and KV head.

    model: where there is one already; the text part of a larger model has a config that no list names.
    """
    text = config.get_text_config(decoder=True)
    layer_types = set(config_field(text, "layer_types") or ()) - ATTENTION_LAYERS
    causal = model.can_generate() if model is not None else type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    reason = None
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif config_field(text, "kv_lora_rank") or config_field(text, "qk_rope_head_dim"):
        reason = "multi-head latent attention already stores a compressed latent"
    elif layer_types:
        reason = f"it has layers without a plain KV cache ({', '.join(sorted(layer_types))})"
    elif config_field(text, "num_kv_shared_layers"):
        reason = "its layers share one another's KV cache"
    elif (config_field(text, "num_hidden_layers") or 0) > MOST_LAYERS:
        reason = f"its config says that it has more than {MOST_LAYERS} layers"
    elif not causal:
        reason = "it is no causal language model"
    elif not getattr(text, "use_cache", True):
        reason = "Model doesn't have past_key_values (config.use_cache is False)"
    if reason:
        raise UnsupportedModel(f"{spec} ({config.model_type}) can't be compressed: {reason}; {SUPPORTED}")


def config_field(config, name: str):
    """A config's field, None where it has none; the first layer's where layers differ, and no other may be asked."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError, which older transformers lack
        return getattr(config.per_layer_config[0], name, None)


def window_without_mask(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether a sliding window comes from transformers' cache alone, which forgets, and no mask of the model has it.

    Moshi is so: a cache that keeps every token would show it more than it was trained to see.
    """
    files = {type(module).__module__ for module in model.modules()}
    masks = {name for file in files for name in vars(sys.modules[file]) if name.startswith("create_")}
    windows = any(layer.is_sliding for layer in cache.layers)
    return windows and not any("sliding" in name or "chunked" in name for name in masks)

"""Which models can't be compressed, and why: known before any weight is read."""

from __future__ import annotations

import logging

import transformers
from transformers import PreTrainedModel

from gpt2.common.errors import UnsupportedModel
from gpt2.models.geometry import config_field, layer_kinds

log = logging.getLogger(__name__)
MOST_LAYERS = 1024  # beyond any model's: a config of a few bytes can't keep a machine busy with laying out millions
SUPPORTED = "supported: decoder-only models with layers that keep K and V of tokens"


def auto_class(config) -> type | None:
    """The class of transformers that makes a model of a config which generates text: images may be part of its prompts.

    None where there is none.
    """
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return None


def rotary_types(config) -> set[str]:
    """Ways in which a model scales its rotary positions, of all layers; "default" for none."""
    rotary = config_field(config.get_text_config(decoder=True), "rope_parameters") or {}
    own = [part for part in rotary.values() if isinstance(part, dict)] or [rotary]  # some have one per kind of layer
    return {str(part.get("rope_type", "default")) for part in own}


def drops_at(config) -> int | None:
    """Tokens past which transformers drops the cache that it is given: longrope's; None where it never does."""
    trained = config_field(config.get_text_config(decoder=True), "original_max_position_embeddings")
    return trained if "longrope" in rotary_types(config) else None


def warn_of_drop(name: str, tokens: int | None) -> None:
    """Log that transformers drops the cache of a model past so many tokens; None: it doesn't."""
    if tokens:
        log.warning(
            "%s: where a text grows past %s tokens, transformers drops the cache that it is given and goes on with an "
            "uncompressed one: keep prompt and answer below that, or begin with a longer prompt", name, tokens,
        )  # fmt: skip


def warn_of_positions(config) -> None:
    """Log where a model's positions change with the length of a text, which no stored key can follow.

    longrope (Phi-3, Phi-3.5-MoE): transformers computes all keys again at the length where factors switch, with an
    uncompressed cache of its own. dynamic: frequencies change from the trained length on, so older keys were rotated by
    others than a codec un-rotates them by.
    """
    text = config.get_text_config(decoder=True)
    warn_of_drop(config.model_type, drops_at(config))
    if "dynamic" in rotary_types(config):
        longest = config_field(text, "max_position_embeddings")
        log.warning(
            "%s: dynamic NTK changes the rotation of keys past %s tokens, so codecs that un-rotate keys (framed, "
            "joint: presets kv-* and store-*) lose more there: use kv4, or grouped (fast-*), for longer texts",
            config.model_type, longest,
        )  # fmt: skip


def refuse_unsupported(config, spec: str, model: PreTrainedModel | None = None) -> None:
    """Raise UnsupportedModel, with the reason, for models that have no cache of K and V, by their config alone.

    model: where there is one already; the text part of a larger model has a config that no list names.
    """
    text = config.get_text_config(decoder=True)
    causal = model.can_generate() if model is not None else auto_class(config) is not None
    reason = None
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif (config_field(text, "num_hidden_layers") or 0) > MOST_LAYERS:
        reason = f"its config says that it has more than {MOST_LAYERS} layers"
    elif not causal:
        reason = "it is no causal language model"
    elif not getattr(text, "use_cache", True):
        reason = "Model doesn't have past_key_values (config.use_cache is False)"
    elif not any(layer.attends for layer in layer_kinds(config)):
        reason = "none of its layers keeps K and V of tokens"
    if reason:
        raise UnsupportedModel(f"{spec} ({config.model_type}) can't be compressed: {reason}; {SUPPORTED}")

"""Measure a model: the shape of its cache, and what tells it from others: its fingerprint and its sketch."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gpt2.common.errors import PluginError, UnsupportedModel
from gpt2.common.schema import Number, Record
from gpt2.models.geometry import HYBRID, HYBRID_SLIDING, LINEAR, UNUSED, Geometry, Shape, config_field, layer_kinds
from gpt2.models.support import SUPPORTED, auto_class, drops_at, refuse_unsupported, rotary_types


@torch.no_grad()
def probe_geometry(model: PreTrainedModel, spec: str) -> Geometry:
    """Shape of the cache, read off one forward pass of two tokens: configs name it in too many ways."""
    kinds = layer_kinds(model.config)
    cache = DynamicCache(config=model.config)
    output = model(torch.zeros(1, 2, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    # Some fill it and don't return it; so do encoders, whose tokens see later ones
    filled = any(getattr(layer, "keys", None) is not None for layer in cache.layers)
    encoder = config_field(model.config.get_text_config(decoder=True), "is_decoder") is False
    if getattr(output, "past_key_values", None) is None and (encoder or not filled):
        raise UnsupportedModel(f"Model doesn't have past_key_values: {spec} returned no cache; {SUPPORTED}")
    layers = []
    for kind, layer in zip(kinds, [*cache.layers, *[None] * len(kinds)], strict=False):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if kind.attends and keys is None:  # a layer that the model never gives K and V
            kind = replace(kind, kind=LINEAR if kind.kind in (HYBRID, HYBRID_SLIDING) else UNUSED, window=None)
        shapes = [Shape(t.shape[1], t.shape[3]) for t in (keys, values)] if kind.attends else [None, None]
        layers.append(replace(kind, k=shapes[0], v=shapes[1], **_uncompressed(layer)))
    if not any(layer.attends for layer in layers):
        raise UnsupportedModel(f"{spec} can't be compressed: none of its layers keeps K and V of tokens; {SUPPORTED}")
    return Geometry(tuple(layers), drops_at(model.config))


def _uncompressed(layer) -> dict[str, int]:
    """What a layer of transformers' own cache holds beside K and V: `state_bytes` and `index_width`."""
    states = (getattr(layer, name, None) for name in ("conv_states", "recurrent_states"))
    tensors = [state for group in states if isinstance(group, dict) for state in group.values() if state is not None]
    # Of a 16-bit model; states that stay in 32 bits there show as such only where the model is loaded in 16
    size = sum(state.numel() * min(state.element_size(), 4) // (1 if layer.dtype != torch.float32 else 2)
               for state in tensors)  # fmt: skip
    index = getattr(getattr(layer, "indexer", layer), "indexer_keys", None)
    return {"state_bytes": size, "index_width": 0 if index is None else index.shape[-1]}


SIGNS = 64  # of every matrix
ROTARY = Record(others=Number())  # what `rotary` gives, in files


def fingerprint(model: PreTrainedModel) -> str:
    """Hash that tells a model from others, also from a fine-tune of itself; the same from a hub id and a local copy.

    Config fields that shape the cache, scaled rotary positions (YaRN and the like), and the signs of a few weights of
    every matrix: signs survive a change of dtype. An outline, on the meta device, has no weights: the names of its
    matrices count alone.
    """
    digest = hashlib.sha256(_cache_config(model))
    for name, weight in _matrices(model):
        digest.update(name.encode() + bytes(_signs(weight)))
    return digest.hexdigest()[:16]


def sketch(model: PreTrainedModel) -> dict[str, str]:
    """What tells how much two models have in common, where `fingerprint` says only whether they are the same.

    config: hash of what shapes the cache and of the matrices' names. signs: of the weights that the fingerprint looks
    at, packed and as hexadecimal digits; empty for an outline.
    """
    matrices = _matrices(model)
    names = "\n".join(name for name, _ in matrices).encode()
    signs = [sign for _, weight in matrices for sign in _signs(weight)]
    return {
        "config": hashlib.sha256(_cache_config(model) + names).hexdigest()[:16],
        "signs": np.packbits(signs).tobytes().hex(),
    }


def likeness(a: dict[str, str], b: dict[str, str]) -> float:
    """The share of signs that two models' sketches have in common: 1 of equal weights, about 0.5 of unrelated ones.

    0 where the models' configs or matrices differ.
    """
    if a["config"] != b["config"] or len(a["signs"]) != len(b["signs"]) or not a["signs"]:
        return 0.0
    different = (int(a["signs"], 16) ^ int(b["signs"], 16)).bit_count()
    return 1 - different / (4 * len(a["signs"]))


def rotary(config) -> dict[str, float]:
    """Numbers of a config's rotary positions, such as `rope_theta`; `full_attention.rope_theta` of a kind of layer.

    The fingerprint has them only where positions are scaled, and stays as it is for the files that have it.
    """
    text = config.get_text_config(decoder=True)
    held = config_field(text, "rope_parameters") or {"rope_theta": config_field(text, "rope_theta")}
    parts = {f"{name}.": part for name, part in held.items() if isinstance(part, dict)} or {"": held}
    return {
        prefix + name: float(value) for prefix, part in parts.items() for name, value in part.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }  # fmt: skip


def rotary_difference(one: dict[str, float], other: dict[str, float]) -> str | None:
    """The first number that differs of those that both have, as "rope_theta 10000, not 500000"; None if none does."""
    both = (name for name in one if name in other and one[name] != other[name])
    return next((f"{name} {one[name]:g}, not {other[name]:g}" for name in both), None)


def _cache_config(model: PreTrainedModel) -> bytes:
    """The config fields that shape a cache and the keys in it, as JSON."""
    text = model.config.get_text_config(decoder=True)
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim")
    fields = {name: config_field(text, name) for name in names}
    if rotary_types(model.config) != {"default"}:  # scaled positions: keys of other directions and sizes
        fields["rope_parameters"] = config_field(text, "rope_parameters")
    return json.dumps(fields, sort_keys=True).encode()


def _matrices(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in sorted(model.named_parameters()) if weight.dim() > 1]


def _signs(weight: Tensor) -> list[bool]:
    return [] if weight.is_meta else (weight.flatten()[:SIGNS].float() > 0).tolist()  # 8-bit floats can't be compared


_GEOMETRIES: dict[str, tuple[Geometry, int]] = {}


def geometry_of(model_config, model_id: str) -> tuple[Geometry, int]:
    """Shape of a model's cache and bytes of its weights, from its config.

    Raises UnsupportedModel where the cache can't be compressed, PluginError where the config alone doesn't tell.
    """
    refuse_unsupported(model_config, model_id)
    key = model_config.to_json_string(use_diff=False)
    if key not in _GEOMETRIES:  # a model of 80 layers takes seconds to lay out
        model, geometry = lay_out(model_config, model_id)
        dtype = getattr(model_config, "dtype", None)
        size = dtype.itemsize if isinstance(dtype, torch.dtype) else 2
        _GEOMETRIES[key] = geometry, sum(weights.numel() for weights in model.parameters()) * size
    return _GEOMETRIES[key]


def _fix_frequencies(config) -> None:
    """Let rotation that depends on the length of a text be plain: it reads positions, without values on "meta"."""
    rotary = config_field(config.get_text_config(decoder=True), "rope_parameters") or {}
    for part in (rotary, *rotary.values()):
        if isinstance(part, dict) and part.get("rope_type") in ("dynamic", "longrope"):
            part["rope_type"] = "default"


def lay_out(model_config, model_id: str) -> tuple[PreTrainedModel, Geometry]:
    """A model on the meta device, which has shapes and no weights, and the shape of its cache.

    Raises PluginError where the config alone doesn't tell that shape.
    """
    # With a padding token some models look for it among the probe's tokens, which have no values here; others need one
    for padded, attention in itertools.product((False, True), ("eager", "sdpa")):
        try:
            config = copy.deepcopy(model_config)
            config.pad_token_id = getattr(config, "pad_token_id", None) if padded else None
            _fix_frequencies(config)
            with torch.device("meta"):
                # eager first: the mask of others may look at values that there are none of. bfloat16: shapes don't
                # depend on it, and products of experts have no other without values
                model = auto_class(config).from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
            return model, replace(probe_geometry(model, model_id), drops_at=drops_at(model_config))
        except PluginError:
            raise
        except Exception as error:  # code that reads values where there are none fails in many ways
            reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise PluginError(
        f"{model_id} ({model_config.model_type}): its config alone doesn't tell the shape of its cache ({reason}): "
        "load it with gpt2.models.loading.load, and use from_preset or from_policy of gpt2.compression.named_caches"
    )

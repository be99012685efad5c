"""Predicted costs of large models from their configs: bytes of caches, time and memory of calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from transformers import PretrainedConfig

from gpt2.compression.cache.size import held_bytes, plain_bytes
from gpt2.compression.codecs import needs_calibration
from gpt2.compression.codecs.multi_head import heads_per_group
from gpt2.compression.named_caches import from_preset
from gpt2.experiments import cost_model
from gpt2.models import random_weights
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel

NARROW = {"intermediate_size": 32, "vocab_size": 128, "pad_token_id": None}
SIXTEEN = "16-bit"


def narrow(config: PretrainedConfig, geometry: Geometry) -> LoadedModel:
    """A model of the same family with few random weights and a cache of the given shape."""
    heads = geometry.num_kv_heads
    fields = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": heads}
    fields |= NARROW | {"head_dim": geometry.head_dim}
    return random_weights.from_config(random_weights.changed(config, geometry.num_layers, **fields), config.model_type)


def cache_rows(
    configs: Mapping[str, PretrainedConfig],
    contexts: Sequence[int],
    presets: Sequence[str],
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[dict]:
    """Bytes of one sequence: a record per model, context length in tokens, and cache; the 16-bit cache first.

    One layer of the real class, with as many KV heads as share a basis, is filled with noise and multiplied, as all
    layers and groups have the same size.
    """
    rows = []
    for name, config in progress(configs.items()):
        geometry = cost_model.uniform_geometry(config, name)
        heads = heads_per_group(geometry.num_kv_heads, geometry.head_dim)
        part = narrow(config, Geometry.uniform(1, heads, geometry.head_dim))
        parts = geometry.num_layers * geometry.num_kv_heads // heads
        chosen = [from_preset(preset, part) for preset in presets]
        for tokens in contexts:
            plain = plain_bytes(geometry, tokens)
            found = [(SIXTEEN, plain, 0)]
            for choice in chosen:
                # A codec without calibration is shared by all layers
                copies = parts if needs_calibration(choice.preset.record["codec"]) else 1
                held = held_bytes(choice.make, part.geometry, tokens) * parts
                found.append((choice.label, held, choice.make().codec_bytes() * copies))
            rows += [
                {"shape": name, "context_tokens": tokens, "cache": cache, "bytes": held, "basis_bytes": basis,
                 "bytes_per_token": held / tokens, "compression_ratio": plain / held}
                for cache, held, basis in found
            ]  # fmt: skip
    return rows


def calibration_rows(
    configs: Mapping[str, PretrainedConfig],
    samples: int,
    seq_len: int,
    flops_per_s: float,
    fit_s: Callable[[int], float],
) -> list[dict]:
    """Predicted time and memory of a calibration, a record per model.

    flops_per_s: assumed speed of forward and backward passes. fit_s: from the width of a basis to the seconds of
    fitting it.
    """
    rows = []
    for name, config in configs.items():
        dims = cost_model.dimensions(config, name)
        forward = cost_model.forward_flops(dims, seq_len)
        passes = {
            "first_pass": cost_model.first_pass_flops(dims, seq_len),
            "gradient_pass": cost_model.gradient_pass_flops(dims, seq_len),
            "gradient_pass_checkpointing": cost_model.gradient_pass_flops(dims, seq_len, checkpointing=True),
        }
        bases = cost_model.bases(dims)
        rows.append({
            "shape": name,
            "layers": dims.geometry.num_layers,
            "weight_bytes": cost_model.HALF * dims.weights,
            "forward_flops": samples * forward,
            "in_forward_passes": {key: flops / forward for key, flops in passes.items()},
            "seconds": {key: samples * flops / flops_per_s for key, flops in passes.items()},
            "bases": {str(width): count for width, count in bases.items()},
            "fitting_s": sum(count * fit_s(width) for width, count in bases.items()),
            "statistics_bytes": cost_model.statistics_bytes(dims),
            "gradient_statistics_bytes": cost_model.gradient_statistics_bytes(dims),
            "activation_bytes": cost_model.activation_bytes(dims, seq_len),
            "checkpointed_bytes": cost_model.activation_bytes(dims, seq_len, checkpointing=True),
            "logits_bytes": cost_model.logits_bytes(dims, seq_len),
        })  # fmt: skip
    return rows

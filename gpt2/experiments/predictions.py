"""Predicted costs of large models from their configs: bytes of caches, time and memory of calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from transformers import PretrainedConfig

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import plain_bytes
from gpt2.compression.codecs import basis_of
from gpt2.compression.named_caches import from_preset
from gpt2.compression.presets.preset_files import resolve_preset
from gpt2.evaluation.bytes_by_context import measure
from gpt2.experiments import cost_model
from gpt2.models import random_weights
from gpt2.models.loading import LoadedModel

NARROW = {"intermediate_size": 32, "moe_intermediate_size": 32, "vocab_size": 128, "pad_token_id": None}
SIXTEEN = "16-bit"


def narrow(config: PretrainedConfig, name: str) -> LoadedModel:
    """A model of the same family with few random weights, whose cache has the layers and shapes of the config's."""
    geometry = cost_model.dimensions(config, name).geometry
    heads = geometry.num_kv_heads
    fields = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": heads, **NARROW}
    if geometry.alike:
        fields["head_dim"] = geometry.head_dim
    found = random_weights.from_config(random_weights.changed(config, **fields), config.model_type)
    if difference := geometry.difference(found.geometry):
        raise PluginError(f"{name}: no small model has its cache: {difference}: leave it out of --timed-shapes")
    return found


def cache_rows(
    configs: Mapping[str, PretrainedConfig],
    contexts: Sequence[int],
    presets: Sequence[str],
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[dict]:
    """Bytes of one sequence: a record per model, context length in tokens, and cache; the 16-bit cache first.

    Every layer counts in its own shape, and windows have forgotten what they forget. A preset that the layers can't
    have is one record with the `reason`.
    """
    rows = []
    for name, config in progress(configs.items()):
        model = random_weights.outline_of(config, name)
        for tokens in contexts:
            plain = plain_bytes(model.geometry, tokens)
            rows.append(_cache_row(name, SIXTEEN, tokens, plain, plain, 0))
        for preset in presets:
            if reason := _misfit(preset, model):
                rows.append({"shape": name, "cache": preset, "reason": reason})
                continue
            choice = from_preset(preset, model)
            for tokens in contexts:
                own = measure(choice.make, model.geometry, tokens)
                found = tokens, own["bytes"], own["plain_bytes"], own["codec_bytes"]
                rows.append(_cache_row(name, choice.label, *found))
    return rows


def _cache_row(shape: str, cache: str, tokens: int, held: int, plain: int, basis: int) -> dict:
    return {"shape": shape, "context_tokens": tokens, "cache": cache, "bytes": held, "basis_bytes": basis,
            "bytes_per_token": held / tokens, "compression_ratio": plain / held}  # fmt: skip


def _misfit(preset: str, model: LoadedModel) -> str | None:
    """Why the layers of a model can't have the codecs of a preset, None where they can."""
    plan = resolve_preset(preset, model).plan
    codecs = dict.fromkeys(setting.codec for settings in plan.values() for setting in settings if setting)
    shared = [basis for basis in map(basis_of, codecs) if basis.multi_head]
    return next(filter(None, (basis.misfit(model.geometry) for basis in shared)), None)


def calibration_rows(
    configs: Mapping[str, PretrainedConfig],
    samples: int,
    seq_len: int,
    flops_per_s: float,
    fit_s: Callable[[int], float] | None = None,
) -> list[dict]:
    """Predicted time and memory of a calibration, a record per model.

    flops_per_s: assumed speed of forward and backward passes. fit_s: from the width of a basis to the seconds of
    fitting it, None where these aren't known.
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
            "fitting_s": fit_s and sum(count * fit_s(width) for width, count in bases.items()),
            "statistics_bytes": cost_model.statistics_bytes(dims),
            "gradient_statistics_bytes": cost_model.gradient_statistics_bytes(dims),
            "activation_bytes": cost_model.activation_bytes(dims, seq_len),
            "checkpointed_bytes": cost_model.activation_bytes(dims, seq_len, checkpointing=True),
            "logits_bytes": cost_model.logits_bytes(dims, seq_len),
        })  # fmt: skip
    return rows

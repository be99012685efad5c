"""Policies: named trade-offs between memory, quality and speed, for people who would rather not choose a codec.

    choice = choose_policy_for_run(model.config, "Qwen/Qwen2.5-7B", vram_gb=24, batch_size=8, max_context=32768)
    print(choice.explanation)
    cache = create_cache_from_policy(model.config, choice.policy)

Every policy works on any supported model at once: none needs a calibration. What each costs in perplexity was measured
on the embedded model and on Qwen2.5-Coder-0.5B (results/runs); another model's own figures come from
scripts/auto_tune_kv_compression.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.size import plain_bytes
from gpt2.compression.codecs import bases_in, full_rank
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.codecs.ln_nullspace import LayerNormNullspace
from gpt2.compression.presets.any_model import held_by, rank_of, ratios, shape_keys
from gpt2.compression.presets.build import create_cache_from_preset
from gpt2.compression.presets.schema import Preset, parse
from gpt2.compression.settings import Setting, setting_record
from gpt2.models.embedded import EMBEDDED
from gpt2.models.geometry import Geometry
from gpt2.models.probe import geometry_of

GIB = 2**30
# Left for activations, the allocator's gaps and the runtime: a rule of thumb, not a measurement
RESERVED = 0.1
# A decode step expands one layer's K and V: in the arithmetic's 32 bits, in the model's 16, and joined with exact parts
EXPANSION = 4
MEASURED = files.RESULTS / "runs" / f"validate_ppl_policies_{EMBEDDED}.json"


class KVPolicyName(StrEnum):
    """The guide's tiers, mildest first."""

    DEFAULT = "default"
    HIGH_COMPRESSION = "high_compression"
    MEMORY_EMERGENCY = "memory_emergency"


@dataclass(frozen=True)
class Policy:
    """What a policy stores K and V with, in every layer; ppl_budget: relative rise of perplexity it is meant for."""

    k: Setting | None
    v: Setting | None
    ppl_budget: float
    use_case: str
    sink_tokens: int = 4


POLICIES = {
    KVPolicyName.DEFAULT: Policy(
        Setting(bits=8, quantizer="int8_channel"), Setting(bits=8), 0.01, "standard production: no loss that shows"
    ),
    KVPolicyName.HIGH_COMPRESSION: Policy(
        Setting(bits=8, quantizer="int8_channel"),
        Setting(bits=4),
        0.03,
        "longer contexts or more users, for a little quality",
    ),
    # The guide's last tier drops the all-ones direction of V. At 4 bits that saves no byte (63 codes fill as many bytes
    # as 64) and it costs quality: it is here because the guide has it, and results/runs say what it does.
    KVPolicyName.MEMORY_EMERGENCY: Policy(
        Setting(bits=4, quantizer="int4_channel"),
        Setting("ln_nullspace", bits=4),
        0.20,
        "memory is at its limit: slower and worse is accepted",
    ),
}


@dataclass(frozen=True)
class Estimate:
    """What a policy would need in GiB (weights excluded from kv_gib), and whether that fits memory and budget.

    kv_gib includes one layer's expansion. room_gib: the device less its reserve. ppl_delta: measured on the embedded
    model, None where nothing was measured.
    """

    policy: KVPolicyName
    compression_ratio: float
    kv_gib: float
    total_gib: float
    room_gib: float
    ppl_delta: float | None
    fits_memory: bool
    within_budget: bool

    def __str__(self) -> str:
        cost = (
            "perplexity not measured" if self.ppl_delta is None else f"{self.ppl_delta:+.2%} perplexity on {EMBEDDED}"
        )
        memory = f"{self.total_gib:.2f} of {self.room_gib:.2f} GiB, {'fits' if self.fits_memory else 'too much'}"
        return f"  {self.policy}: {self.compression_ratio:.2f}x, {memory}; {cost}" + (
            "" if self.within_budget else ", over budget"
        )


@dataclass(frozen=True)
class PolicyChoice:
    """policy: the mildest that fits, None when none does; explanation: why, in sentences for people."""

    policy: KVPolicyName | None
    explanation: str
    estimates: list[Estimate]

    @property
    def fits(self) -> bool:
        return self.policy is not None


def checked(name: KVPolicyName | str) -> KVPolicyName:
    """A policy's name. Raises PluginError, listing what exists, for another."""
    try:
        return KVPolicyName(name)
    except ValueError as error:
        raise PluginError(f"unknown policy {name!r}: use {', '.join(KVPolicyName)}") from error


def build_compressor_config_for_policy(
    model_config, model_id: str, policy_name: KVPolicyName | str, *, geometry: Geometry | None = None
) -> dict[str, Any]:
    """A policy for one model as a dict: codec, rank and bits of K and of V, exact tokens, and the cache's shape.

    geometry: the shape where it is known already; read off the config when None. `use_ln_nullspace_k` and
    `use_ln_nullspace_v` tell whether that side drops the all-ones direction; `compression_ratio` is of the whole KV
    cache at 2048 tokens, measured on noise in this shape. Raises UnsupportedModel for a model whose cache can't be
    compressed, PluginError for an unknown policy.
    """
    name = checked(policy_name)
    policy, geometry = POLICIES[name], geometry or geometry_of(model_config, model_id)[0]
    held = held_by(policy.k, policy.v, geometry, 2048, policy.sink_tokens)
    return {
        "policy": str(name),
        "use_case": policy.use_case,
        "ppl_budget": policy.ppl_budget,
        "model": model_id,
        "num_kv_heads": geometry.num_kv_heads,
        **shape_keys(geometry),
        "k": _shown(policy.k, geometry),
        "v": _shown(policy.v, geometry),
        "use_ln_nullspace_k": _uses_nullspace(policy.k),
        "use_ln_nullspace_v": _uses_nullspace(policy.v),
        "sink_tokens": policy.sink_tokens,
        "recent_tokens": 0,
        **ratios(geometry, held, 2048),
    }


def preset_for_policy(
    model_config, model_id: str, policy_name: KVPolicyName | str, *, geometry: Geometry | None = None
) -> Preset:
    """A policy as a preset, whose figures of perplexity are unknown until they are measured on this model.

    Arguments and errors as `build_compressor_config_for_policy`.
    """
    config = build_compressor_config_for_policy(model_config, model_id, policy_name, geometry=geometry)
    coded = {side: config[side] for side in SIDES if config[side]}
    own = coded.get("v", coded.get("k"))
    taken = ("model", "num_layers", "head_dim", "cache_layers", "drops_at", "sink_tokens", "recent_tokens",
             "compression_ratio", "attention_ratio")  # fmt: skip
    return parse(
        {key: config[key] for key in taken if key in config}
        | {
            "name": config["policy"],
            "target": "".join(coded),
            **(own | {"rank": full_rank(own["codec"], config["head_dim"])}),
            "calibration_file": "",
            "layers": coded,
        }
    )


def create_cache_from_policy(
    model_config, policy_name: KVPolicyName | str, model_id: str = "model", device: str | torch.device | None = None
) -> CompressedDynamicCache:
    """A fresh cache of a policy for a model, by its config alone."""
    return create_cache_from_preset(preset_for_policy(model_config, model_id, policy_name), device)


def choose_policy_for_run(
    model_config,
    model_id: str,
    vram_gb: float,
    batch_size: int = 1,
    max_context: int = 4096,
    ppl_budget: float = 0.03,
) -> PolicyChoice:
    """The mildest policy with which a run fits into memory and a perplexity budget.

    vram_gb: GiB of the device. Needed: the weights in the config's dtype (16 bits where it names none), the cache of
    `batch_size` sequences of `max_context` tokens by the model's KV heads, and one layer's expansion.
    """
    if not (vram_gb > 0 and batch_size >= 1 and max_context >= 1 and ppl_budget > 0):
        raise PluginError(
            f"choose_policy_for_run: vram_gb={vram_gb}, batch_size={batch_size}, max_context={max_context}, "
            f"ppl_budget={ppl_budget}: all must be positive"
        )
    geometry, weights = geometry_of(model_config, model_id)
    plain = plain_bytes(geometry, max_context) * batch_size
    room = vram_gb * GIB * (1 - RESERVED)
    run = _Run(geometry, weights, plain, batch_size, max_context, room, ppl_budget)
    estimates = [_estimate(name, run) for name in KVPolicyName]
    chosen = next((e.policy for e in estimates if e.fits_memory and e.within_budget and e.compression_ratio > 1), None)
    head = (
        f"{model_id}, {batch_size} × {max_context:,} tokens on {vram_gb:g} GiB: the weights take {weights / GIB:.2f} "
        f"GiB, and a 16-bit cache ({geometry}) would take {plain / GIB:.2f} GiB."
    )
    verdict = f"Chosen: {chosen}, the mildest that fits." if chosen else _why_none(estimates, run)
    return PolicyChoice(chosen, "\n".join([head, *map(str, estimates), verdict]), estimates)


@dataclass(frozen=True)
class _Run:
    """What a run asks for, in bytes; plain: transformers' own 16-bit cache of all its sequences."""

    geometry: Geometry
    weights: int
    plain: int
    batch_size: int
    max_context: int
    room: float
    ppl_budget: float


def _estimate(name: KVPolicyName, run: _Run) -> Estimate:
    held = policy_bytes(POLICIES[name], run.geometry, run.max_context) * run.batch_size
    largest = max(layer.held(run.max_context) * layer.bytes_per_token() for layer in run.geometry.layers)
    one_layer = largest * run.batch_size
    kv = held + EXPANSION * one_layer
    total, delta = run.weights + kv, measured_delta(name)
    return Estimate(
        name, run.plain / held, kv / GIB, total / GIB, run.room / GIB, delta, total <= run.room,
        _within(delta, name, run.ppl_budget),
    )  # fmt: skip


def _within(delta: float | None, name: KVPolicyName, ppl_budget: float) -> bool:
    """By what was measured; where nothing was, by what the policy is meant for."""
    return (POLICIES[name].ppl_budget if delta is None else delta) <= ppl_budget


def _why_none(estimates: list[Estimate], run: _Run) -> str:
    """Why no policy was chosen, and what would do."""
    smallest = min(estimates, key=lambda e: e.kv_gib)
    left = run.room - run.weights
    if left <= 0:
        return "Nothing fits: the weights alone leave no room for a cache. Use a larger device or a smaller model."
    if all(e.compression_ratio <= 1 for e in estimates):
        return ("No policy saves anything: the cache is short, or what it holds is mostly states and short windows, "
                "which stay as they are. Use DynamicCache.")  # fmt: skip
    if run.plain <= left:
        return "Nothing that saves memory stays within the budget, but the uncompressed cache fits: use DynamicCache."
    if not any(e.fits_memory for e in estimates):
        most = int(run.batch_size * run.max_context * left / (smallest.kv_gib * GIB))
        return (f"Nothing fits. With {smallest.policy}, about {most:,} tokens over all sequences would: use a shorter "
                "context, a smaller batch, or a larger device.")  # fmt: skip
    return ("Nothing fits: what fits the memory is over the perplexity budget. Raise ppl_budget, or ask for a shorter "
            "context or a smaller batch.")  # fmt: skip


def policy_bytes(policy: Policy, geometry: Geometry, tokens: int) -> float:
    """Bytes of the whole cache that a policy holds for one sequence of `tokens`."""
    held = held_by(policy.k, policy.v, geometry, tokens, policy.sink_tokens)
    return held + geometry.uncompressed_bytes(tokens)


def measured_delta(name: KVPolicyName) -> float | None:
    """Relative change of perplexity that the policy costs the embedded model, from the committed results."""
    try:
        rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        return None
    return next((row["ppl_delta"] for row in rows if row.get("policy") == name), None)


def _shown(setting: Setting | None, geometry: Geometry) -> dict | None:
    return setting and setting_record(setting) | {"rank": rank_of(setting, geometry)}


def _uses_nullspace(setting: Setting | None) -> bool:
    return setting is not None and LayerNormNullspace.name in bases_in(setting.codec)

"""Caches made from presets, which files can say: of each kind of codec that needs no calibration, and an exact one."""

from __future__ import annotations

from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.presets import create_cache_from_preset
from gpt2.compression.presets.any_model import preset_for_any_model
from gpt2.models.geometry import Geometry

EXACT = {"layers": None, "codec": "identity", "bits": 16, "quantizer": None}  # over a preset's own
PRESETS = {"kv4": ("kv4", {}), "kv8": ("kv8", {"recent_tokens": 9}), "exact": ("kv8", EXACT)}
TINY_LLAMA = Geometry.uniform(3, 2, 12)


def cache_of(
    model, name: str = "kv4", family: str = "llama", geometry: Geometry = TINY_LLAMA
) -> CompressedDynamicCache:
    """An empty cache; model: None for one that nothing is known of but its layers."""
    base, own = PRESETS[name]
    return create_cache_from_preset(preset_for_any_model(base, family, geometry) | own, model=model)

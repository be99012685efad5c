"""Presets: everything a compressed cache is made from, as JSON that people pass around.

cache = create_cache_from_preset(get_preset_info("smollm2-135m", "int4-vonly"))
"""

from gpt2.compression.presets.build import create_cache_from_preset
from gpt2.compression.presets.preset_files import built_in_presets, get_preset_info, load_preset, resolve_preset

__all__ = ["built_in_presets", "create_cache_from_preset", "get_preset_info", "load_preset", "resolve_preset"]

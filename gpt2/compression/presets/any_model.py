"""Presets for any model at once: nothing is calibrated, only the shape of the model's cache is asked.

    cache = create_cache_from_preset(get_preset_info("Qwen/Qwen2.5-0.5B", "kv4"))

Keys are coded by channel (KIVI, Liu et al. 2024), for what is large or far from zero in keys is a channel. Values at 8
bits are coded by token, which loses nothing that shows; at 4 bits they are rotated and coded by channel: at the same
bytes as good as by token, and smaller below a head_dim of 96. Measured on the embedded model only.
"""

from __future__ import annotations

from functools import partial

from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.size import held_bytes, plain_bytes
from gpt2.compression.codecs import full_rank
from gpt2.compression.presets.schema import DEFAULTS
from gpt2.compression.settings import Setting, build, setting_record
from gpt2.models.geometry import Geometry

# Name to the settings of K and of V in every layer
ANY_MODEL = {
    "kv8": (Setting(bits=8, quantizer="int8_channel"), Setting(bits=8)),
    "kv4": (Setting(bits=4, quantizer="int4_channel"), Setting("hadamard", bits=4, quantizer="int4_channel")),
}
SINK_TOKENS = 4
RATIO_TOKENS = 2048


def preset_for_any_model(name: str, model: str, geometry: Geometry, config) -> dict:
    """A preset of `ANY_MODEL` for a model of this shape, as a JSON object.

    config: of the model, for what transformers' own cache keeps of it. The preset's ratio is of the whole KV cache at
    2048 tokens, measured on noise in this shape; its figures of perplexity are unknown.
    """
    settings = ANY_MODEL[name]
    held = held_by(*settings, geometry, RATIO_TOKENS, SINK_TOKENS)
    k, v = (setting_record(s) | {"rank": full_rank(s.codec, geometry.head_dim)} for s in settings)
    return DEFAULTS | {
        "name": name,
        "model": model,
        "num_layers": geometry.num_layers,
        "head_dim": geometry.head_dim,
        "target": "kv",
        **v,
        "layers": {"k": k, "v": v},
        "sink_tokens": SINK_TOKENS,
        "calibration_file": "",
        "compression_ratio": round(plain_bytes(geometry, RATIO_TOKENS, config=config) / held, 4),
    }


def held_by(k: Setting | None, v: Setting | None, geometry: Geometry, tokens: int, sink_tokens: int) -> float:
    """Bytes that settings without a calibration hold for one sequence, measured on one layer: all layers are alike.

    From 4096 tokens on it is taken to grow in proportion: sinks and unused room weigh less and less.
    """
    measured = min(tokens, 4096)
    one_layer = Geometry.uniform(1, geometry.num_kv_heads, geometry.head_dim)
    compressors = build({"k": [k], "v": [v]}, one_layer)
    make = partial(CompressedDynamicCache, *compressors, sink_tokens=sink_tokens)
    return held_bytes(make, one_layer, measured) * geometry.num_layers * tokens / measured

"""Presets for any model at once: nothing is calibrated, only the shape of the model's cache is asked.

    cache = create_cache_from_preset(get_preset_info("Qwen/Qwen2.5-0.5B", "kv4"))

Keys are coded by channel (KIVI, Liu et al. 2024), for what is large or far from zero in keys is a channel. Values at 8
bits are coded by token, which loses nothing that shows; at 4 bits they are rotated and coded by channel: at the same
bytes as good as by token, and smaller below a head_dim of 96. Measured on three small models.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.size import cache_bytes, filled, plain_bytes
from gpt2.compression.codecs import full_rank
from gpt2.compression.codecs.formats import BLOCK
from gpt2.compression.presets.schema import DEFAULTS
from gpt2.compression.settings import Setting, build, setting_record
from gpt2.models.geometry import FULL, SLIDING, Geometry, LayerGeometry

# Name to the settings of K and of V in every layer
ANY_MODEL = {
    "kv8": (Setting(bits=8, quantizer="int8_channel"), Setting(bits=8)),
    "kv4": (Setting(bits=4, quantizer="int4_channel"), Setting("hadamard", bits=4, quantizer="int4_channel")),
}
SINK_TOKENS = 4
RATIO_TOKENS = 2048


def preset_for_any_model(name: str, model: str, geometry: Geometry) -> dict:
    """A preset of `ANY_MODEL` for a model of these layers, as a JSON object.

    Its ratio is of the whole cache at 2048 tokens, measured on noise in this shape; its figures of perplexity are
    unknown.
    """
    settings = ANY_MODEL[name]
    held = held_by(*settings, geometry, RATIO_TOKENS, SINK_TOKENS)
    k, v = (setting_record(s) | {"rank": rank_of(s, geometry)} for s in settings)
    return DEFAULTS | {
        "name": name,
        "model": model,
        **shape_keys(geometry),
        "target": "kv",
        **(v | {"rank": full_rank(settings[1].codec, geometry.head_dim)}),
        "layers": {"k": k, "v": v},
        "sink_tokens": SINK_TOKENS,
        "calibration_file": "",
        **ratios(geometry, held, RATIO_TOKENS),
    }


def rank_of(setting: Setting, geometry: Geometry) -> int | None:
    """All coordinates: their number, or None where layers differ in it."""
    return full_rank(setting.codec, geometry.head_dim) if geometry.alike else None


def shape_keys(geometry: Geometry) -> dict:
    """Keys of a preset that say the shape of its cache; the guide's two are enough where all layers are alike."""
    guide = {"num_layers": geometry.num_layers, "head_dim": geometry.head_dim}
    drop = {"drops_at": geometry.drops_at} if geometry.drops_at else {}
    return guide | ({} if geometry.alike else {"cache_layers": geometry.record()}) | drop


def ratios(geometry: Geometry, held: float, tokens: int) -> dict:
    """`compression_ratio` of the whole cache, and where other layers hold bytes too, `attention_ratio` of K and V.

    held: bytes of K and V of one sequence of `tokens`.
    """
    others = geometry.uncompressed_bytes(tokens)
    found = {"compression_ratio": round(plain_bytes(geometry, tokens) / (held + others), 4)}
    return found | ({} if not others else {"attention_ratio": round(geometry.attention_bytes(tokens) / held, 4)})


def held_by(k: Setting | None, v: Setting | None, geometry: Geometry, tokens: int, sink_tokens: int) -> float:
    """Bytes of K and V that settings without a calibration hold for one sequence, measured on one layer of each shape.

    From 4096 tokens on it is taken to grow in proportion: sinks and unused room weigh less and less. A window no longer
    than that doesn't grow at all.
    """
    each = Counter(replace(geometry.layers[index], kind=FULL) for index in geometry.attention)
    return sum(count * _held_by_layer(k, v, layer, tokens, sink_tokens) for layer, count in each.items())


def _held_by_layer(k: Setting | None, v: Setting | None, layer: LayerGeometry, tokens: int, sink_tokens: int) -> float:
    held = tokens if layer.window is None else min(tokens, layer.window - 1)
    measured = min(held, 4096)
    if layer.window is not None and tokens > held:  # blocks behind a window, as after many steps
        layer = replace(layer, kind=SLIDING, window=measured + 1)
    one = Geometry((layer if layer.kind == SLIDING else replace(layer, window=None),))
    compressors = build({"k": [k], "v": [v]}, one)
    make = partial(CompressedDynamicCache, *compressors, geometry=one, sink_tokens=sink_tokens)
    behind = 2 * BLOCK + (tokens - measured) % BLOCK  # so that as many tokens wait for a block as after `tokens`
    cache = filled(make, one, measured + (behind if one.layers[0].window else 0))
    return cache_bytes(cache) * held / measured

"""Bytes that a cache holds by context length, measured without a model: one layer stands for all that are like it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

from transformers.cache_utils import Cache

from gpt2.compression.cache import size
from gpt2.compression.codecs.formats import BLOCK
from gpt2.models.geometry import Geometry, LayerGeometry

LONGEST = 2**17  # tokens of the longest sequence that is really stored
SHORT = 256  # tokens that tell which layers are alike


def layers_alike(make_cache: Callable[[], Cache], geometry: Geometry) -> dict[int, int]:
    """Number of one layer of each sort to how many there are: layers of one shape that hold as many bytes.

    A codec may have other bits in every layer; such layers hold different numbers of bytes.
    """
    cache, counts, first = size.filled(make_cache, geometry, SHORT), Counter(), {}
    for index in geometry.attention:
        held = size.cache_bytes(SimpleNamespace(layers=[cache.layers[index]]))
        counts[first.setdefault((geometry.layers[index], held), index)] += 1
    return dict(counts)


def measure(make_cache: Callable[[], Cache], geometry: Geometry, tokens: int) -> dict:
    """Results record of one sequence of `tokens`: bytes held, and ratios to transformers' own 16-bit cache.

    A context longer than LONGEST is taken to hold K and V in proportion to LONGEST tokens; `measured_tokens` says so.
    `compression_ratio` is of the whole cache, where windows forget and states stay as they are, `attention_ratio` of K
    and V alone.
    """
    measured, held = min(tokens, LONGEST), Counter()
    for index, count in layers_alike(make_cache, geometry).items():
        layer = geometry.layers[index]
        cache = size.filled(make_cache, geometry, _telling(layer, measured), layers=[index])
        exact, unused = size.exact_and_unused_bytes(cache)
        more = layer.held(tokens) / layer.held(measured)
        held += Counter(kv=round(count * more * size.cache_bytes(cache)), exact=count * exact, unused=count * unused)
    others, plain = geometry.uncompressed_bytes(tokens), geometry.attention_bytes(tokens)
    whole, codec = held["kv"] + others, size.filled(make_cache, geometry, SHORT).codec_bytes()
    return {
        "context_tokens": tokens, "measured_tokens": measured, "bytes": whole, "bytes_per_token": whole / tokens,
        "attention_bytes": held["kv"], "uncompressed_bytes": others, "plain_bytes": plain + others,
        "exact_bytes": held["exact"], "unused_bytes": held["unused"], "codec_bytes": codec,
        "compression_ratio": (plain + others) / whole, "attention_ratio": plain / held["kv"],
        "ratio_with_codec": (plain + others) / (whole + codec),
    }  # fmt: skip


def _telling(layer: LayerGeometry, tokens: int) -> int:
    """Tokens after which a layer holds as many bytes as after `tokens`: a window that has moved on repeats itself."""
    if layer.window is None:
        return tokens
    settled = 4 * BLOCK + 2 * -(-layer.window // BLOCK) * BLOCK
    return settled + tokens % BLOCK if tokens > settled else tokens

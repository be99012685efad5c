"""Bytes that a cache holds by context length, measured without a model: one layer stands for all that are like it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from gpt2.compression.cache import size
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.models.geometry import Geometry


def measure(make_cache: Callable[[], CompressedDynamicCache], geometry: Geometry, tokens: int) -> dict:
    """Results record of one sequence of `tokens`: bytes held, and ratios to transformers' own 16-bit cache.

    Up to `size.LONGEST_MEASURED` tokens are really stored, of longer contexts the same is counted without values.
    `compression_ratio` is of the whole cache, where windows forget and states stay as they are, `attention_ratio` of K
    and V alone.
    """
    held, stored = Counter(), tokens <= size.LONGEST_MEASURED
    for index, count in size.layers_alike(make_cache, geometry).items():
        cache = size.filled(make_cache, geometry, tokens, layers=[index], values=stored)
        exact, unused = size.exact_and_unused_bytes(cache)
        held += Counter(kv=count * size.cache_bytes(cache), exact=count * exact, unused=count * unused)
    others, plain = geometry.uncompressed_bytes(tokens), geometry.attention_bytes(tokens)
    whole, codec = held["kv"] + others, make_cache().codec_bytes()
    return {
        "context_tokens": tokens, "bytes": whole, "bytes_per_token": whole / tokens,
        "attention_bytes": held["kv"], "uncompressed_bytes": others, "plain_bytes": plain + others,
        "exact_bytes": held["exact"], "unused_bytes": held["unused"], "codec_bytes": codec,
        "compression_ratio": (plain + others) / whole, "attention_ratio": plain / held["kv"],
        "ratio_with_codec": (plain + others) / (whole + codec),
    }  # fmt: skip

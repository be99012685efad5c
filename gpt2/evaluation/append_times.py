"""Time to append one token to a cache, and the bytes that it then takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import Cache

from gpt2.compression.cache.size import cache_bytes, store
from gpt2.evaluation.statistics import spread
from gpt2.models.geometry import Shape


def measure(
    make_cache: Callable[[], Cache], shape: Shape, tokens_held: int, repeats: int, device: torch.device
) -> dict[str, float | list[float]]:
    """Append tokens one by one to all layers of a cache that holds noise. Nothing is read.

    shape: of each layer's K and V. repeats: tokens that are appended, each timed. Times are in milliseconds.
    """
    cache = make_cache()
    size = (1, shape.heads, tokens_held, shape.width)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    for layer in cache.layers:
        store(layer, x, x)
    token, times = x[:, :, :1], []
    for _ in range(repeats):
        start = time.perf_counter()
        for layer in cache.layers:
            store(layer, token, token)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return {
        "tokens_held": tokens_held, **spread("append_ms", times), "append_ms_mean": statistics.mean(times),
        "cache_bytes": cache_bytes(cache),
        "bytes_per_token": cache_bytes(cache) / (tokens_held + repeats),
    }  # fmt: skip

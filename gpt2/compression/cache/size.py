"""Bytes of a cache, by one rule for every kind of cache: what its distinct storages hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache
from transformers.cache_utils import Cache

from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.codecs import Compressor
from gpt2.models.geometry import Geometry


def cache_bytes(cache: Cache) -> int:
    """Bytes of all storages that a cache keeps alive, room that is allocated but unused included.

    Each storage counts once and whole, so a small view of a large tensor costs the large tensor. Codecs are shared
    between sequences and not counted: see `CompressedDynamicCache.codec_bytes`.
    """
    storages: dict[tuple, int] = {}
    seen: set[int] = set()
    waiting: list = list(cache.layers)
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (Compressor, type)):
            continue
        seen.add(id(item))
        if is_traceable_wrapper_subclass(item):
            # Such as quanto's: it claims the size of what it stands for, and only its inner tensors have memory
            waiting += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
        elif isinstance(item, Tensor):
            storage = item.untyped_storage()
            # Without memory behind it a storage has no address, but is still one of its own
            storages[item.device, storage.data_ptr() or storage._cdata] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
    return sum(storages.values())


def compression_ratio(
    make_cache: Callable[[], Cache],
    geometry: Geometry,
    tokens: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    *,
    config=None,
) -> float:
    """Bytes of a 16-bit DynamicCache over bytes that a cache of `make_cache` holds, for one sequence of `tokens`.

    config: of the model; DynamicCache keeps only the window of sliding layers. The rest as in `held_bytes`.
    """
    return plain_bytes(geometry, tokens, config=config) / held_bytes(make_cache, geometry, tokens, dtype)


def held_bytes(
    make_cache: Callable[[], Cache],
    geometry: Geometry,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    chunk: int | None = None,
) -> int:
    """Bytes that a cache holds for one sequence of `tokens`, measured; as `filled`."""
    return cache_bytes(filled(make_cache, geometry, tokens, dtype, chunk=chunk))


def filled(
    make_cache: Callable[[], Cache],
    geometry: Geometry,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    chunk: int | None = None,
) -> Cache:
    """A cache that holds one sequence of `tokens`.

    It is filled with noise: sizes don't depend on the values. dtype: of what the cache keeps exact. chunk: tokens that
    are fed at a time, as streamed perplexity does; None feeds a prompt of half the length and then chunks of 64.
    """
    cache = make_cache()
    shape = (1, geometry.num_kv_heads, tokens, geometry.head_dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    pieces = x.split(chunk, dim=2) if chunk else (x[:, :, : tokens // 2], *x[:, :, tokens // 2 :].split(64, dim=2))
    for piece in pieces:
        for layer in cache.layers:
            # `update` would also expand all that is stored, which the size doesn't need; others' caches have only that
            getattr(layer, "store", layer.update)(piece, piece)
    return cache


def exact_and_unused_bytes(cache: CompressedDynamicCache) -> tuple[int, int]:
    """Of the bytes of a cache of ours: those of exact tokens (sinks and tail), and of room that isn't used yet."""
    stores = [store for layer in cache.layers for store in layer.stores.values()]
    exact = sum(tensor.nbytes for store in stores for tensor in (store.sinks, store.tail))
    growing = [pieces for store in stores for pieces in store.blocks.values() if pieces.room]
    return exact, sum(pieces.room * pieces.parts[-1][:, :, :1].nbytes for pieces in growing)


def plain_bytes(geometry: Geometry, tokens: int, *, config=None) -> int:
    """Bytes that transformers' own cache holds for one sequence of `tokens` in 16 bits; nothing is allocated.

    config: of the model, whose sliding layers keep only their window; None takes every layer for a full one.
    """
    cache = DynamicCache(config=config)
    shape = (1, geometry.num_kv_heads, tokens, geometry.head_dim)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    for chunk in x.split([tokens - tokens // 2, tokens // 2] if tokens < 128 else [tokens - 64, 64], dim=2):
        for index in range(geometry.num_layers):
            cache.update(chunk, chunk, index)
    return cache_bytes(cache)

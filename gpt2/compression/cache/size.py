"""Bytes of a cache, by one rule for every kind of cache: the sum of its distinct storages. Also fills caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.layers import CompressedLayer
from gpt2.compression.cache.size_only import without_values
from gpt2.compression.cache.storages import storages_of
from gpt2.models.geometry import Geometry

LONGEST_MEASURED = 8192  # tokens


def cache_bytes(*caches: Cache) -> int:
    """Bytes of all storages that caches keep alive, including memory that is allocated but unused.

    Each storage counts once and whole: what forks share counts once, and a small view of a large tensor costs the large
    tensor. Compressors are shared between sequences and not counted: see `CompressedDynamicCache.codec_bytes`.
    """
    return sum(storages_of(*(cache.layers for cache in caches)).values())


def compression_ratio(
    make_cache: Callable[[], Cache], geometry: Geometry, tokens: int = 2048, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Bytes of transformers' own 16-bit cache over bytes of a cache of `make_cache`, for one sequence of `tokens`.

    The whole cache counts: windows forget, and states stay as they are. Arguments as in `held_bytes`.
    """
    return plain_bytes(geometry, tokens) / held_bytes(make_cache, geometry, tokens, dtype)


def attention_ratio(
    make_cache: Callable[[], Cache], geometry: Geometry, tokens: int = 2048, dtype: torch.dtype = torch.bfloat16
) -> float:
    """As `compression_ratio`, of K and V alone."""
    held = held_bytes(make_cache, geometry, tokens, dtype) - geometry.uncompressed_bytes(tokens)
    return geometry.attention_bytes(tokens) / held


def held_bytes(
    make_cache: Callable[[], Cache],
    geometry: Geometry,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    chunk: int | None = None,
) -> int:
    """Bytes that a cache of `make_cache` holds for one sequence of `tokens`, states and indexers among them.

    K and V are measured; arguments as in `filled`. Beyond `LONGEST_MEASURED` tokens nothing is stored: our own caches
    are filled without values, so that the result is the same, and others are taken to grow as they do up to there,
    unless a window ends on the way.
    """
    others = geometry.uncompressed_bytes(tokens)
    if tokens > LONGEST_MEASURED and isinstance(make_cache(), CompressedDynamicCache):
        each = layers_alike(make_cache, geometry, dtype).items()
        one = partial(filled, make_cache, geometry, tokens, dtype, chunk=chunk, values=False)
        return sum(count * cache_bytes(one(layers=[index])) for index, count in each) + others
    ends = [layer.window for layer in geometry.layers if layer.window and layer.window > LONGEST_MEASURED // 2]
    if tokens <= LONGEST_MEASURED or ends:
        return cache_bytes(filled(make_cache, geometry, tokens, dtype, chunk=chunk)) + others
    short, long = (
        cache_bytes(filled(make_cache, geometry, n, dtype, chunk=chunk))
        for n in (LONGEST_MEASURED // 2, LONGEST_MEASURED)
    )
    return long + round((long - short) / (LONGEST_MEASURED // 2) * (tokens - LONGEST_MEASURED)) + others


def layers_alike(
    make_cache: Callable[[], CompressedDynamicCache], geometry: Geometry, dtype: torch.dtype = torch.bfloat16
) -> dict[int, int]:
    """Number of one layer of each sort to how many there are: layers of one shape whose codecs store as many bytes.

    A codec may have other bits in every layer.
    """
    signatures, first = without_values(make_cache(), geometry, dtype), {}
    return dict(Counter(first.setdefault(own, index) for index, own in signatures.items()))


def filled(
    make_cache: Callable[[], Cache],
    geometry: Geometry,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    chunk: int | None = None,
    layers: Iterable[int] | None = None,
    values: bool = True,
) -> Cache:
    """A cache that holds K and V of one sequence of `tokens` of noise: sizes don't depend on the values.

    dtype: of the exact tokens. chunk: tokens that are appended at a time, as streamed perplexity does; None appends a
    prompt of half the length and then chunks of 64. layers: numbers of those to fill, with the others left empty; None
    fills all. values: whether anything is stored; without, a CompressedDynamicCache grows as it would, on the meta
    device, and can't be read.
    """
    prompt = tokens // 2
    sizes = [chunk] * (tokens // chunk) + [tokens % chunk] if chunk else [prompt, *[64] * ((tokens - prompt) // 64)]
    sizes = [size for size in (*sizes, 0 if chunk else (tokens - prompt) % 64) if size]
    cache = make_cache()
    if not values:
        without_values(cache, geometry, dtype)
    vectors = noise if values else _nothing
    for index in geometry.attention if layers is None else layers:
        layer = geometry.layers[index]
        x = {shape: vectors(shape.heads, tokens, shape.width, dtype=dtype) for shape in {layer.k, layer.v}}
        for k, v in zip(x[layer.k].split(sizes, dim=2), x[layer.v].split(sizes, dim=2), strict=True):
            store(cache.layers[index], k, v) if index < len(cache.layers) else cache.update(k, v, index)
    return cache


def noise(
    heads: int, tokens: int, head_dim: int, *, batch: int = 1, dtype: torch.dtype = torch.bfloat16,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Gaussian noise [B, H, T, d] on the generator's device, the same at each call where no generator is given."""
    generator = generator or torch.Generator().manual_seed(0)
    return torch.randn(batch, heads, tokens, head_dim, generator=generator, device=generator.device).to(dtype)


def _nothing(heads: int, tokens: int, width: int, *, dtype: torch.dtype) -> Tensor:
    """As `noise`, with a shape alone."""
    return torch.empty(1, heads, tokens, width, dtype=dtype, device="meta")


def fill(cache: Cache, chunks: Iterable[tuple[Tensor, Tensor]]) -> Cache:
    """Append the same K and V, chunks of [B, H, n, d] each, to every layer of a cache; returns the cache."""
    for k, v in chunks:
        for layer in cache.layers:
            store(layer, k, v)
    return cache


def store(layer, k: Tensor, v: Tensor) -> None:
    """Append K and V to a layer of any cache. Ours store without reconstructing, and forget at once."""
    if not isinstance(layer, CompressedLayer):
        layer.update(k, v)
        return
    layer.store(k, v)
    layer.forget()


def exact_and_unused_bytes(cache: CompressedDynamicCache) -> tuple[int, int]:
    """Bytes of exact tokens (sinks and tail) in a CompressedDynamicCache, and bytes that are allocated but unused."""
    stores = [store for layer in cache.compressed if layer.is_initialized for store in layer.stores.values()]
    exact = sum(tensor.nbytes for store in stores for tensor in (store.sinks, store.tail))
    growing = [stored for store in stores for stored in store.blocks.values() if stored.unused]
    return exact, sum(stored.unused * stored.chunks[-1][:, :, :1].nbytes for stored in growing)


def plain_bytes(geometry: Geometry, tokens: int) -> int:
    """Bytes that transformers' own cache holds for one sequence of `tokens` in 16 bits, states and indexers too."""
    return geometry.attention_bytes(tokens) + geometry.uncompressed_bytes(tokens)

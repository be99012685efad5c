"""What decode steps with Triton share until another block is full: which tokens kernels read, and how these lie."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gpt2.compression.cache.token_store import Half, TokenStore, placed
from gpt2.compression.codecs import Compressor
from gpt2.compression.codecs.base import Encoded
from gpt2.compression.kernels.triton_tiles import DECODERS, MOST_CHANNELS, TILE, Decoder


class Part(NamedTuple):
    """Tokens that are compressed in both stores, at positions [first, end), as `attend_tiles` takes them.

    base: position of the first of `tiles` tiles. starts: positions of the first slots of K's chunk and of V's.
    arguments: fields of K and of V, and for how many entries of each group they have room. dtypes: of the first tensors
    of K and of V. tile_bytes: of a tile of both.
    """

    first: int
    end: int
    base: int
    tiles: int
    starts: tuple[int, int]
    arguments: tuple[tuple, tuple, int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    tile_bytes: int


class Step(NamedTuple):
    """What is the same at every step: first and end are positions of the tokens that both stores have compressed.

    heads: KV heads. groups: of codes. ranks: of K and of V. kernel: what the choice of kernels depends on. stages: most
    tiles that decoders load ahead, and one. constants: of `attend_tiles` for all parts.
    """

    first: int
    end: int
    heads: int
    groups: int
    head_dim: int
    ranks: tuple[int, int]
    kernel: tuple
    parts: list[Part]
    tiles: int
    stages: int
    constants: dict[str, Any]


def step_of(k: TokenStore | Half, v: TokenStore | Half) -> Step | None:
    """What decode steps over K's and V's store share; None where no kernel reads both.

    Kept with K's blocks as long as V's lie where they did, and both have the same tokens in common: sinks and lead
    change only where blocks do.
    """
    if not (k.whole.blocks and v.whole.blocks):
        return None
    kept = next(iter(k.whole.blocks.values())).kept
    now, shared = placed(k, v), _shared_range(k, v)
    before, held, step = kept.get("triton", ((), None, None))
    if shared != held or not all(map(operator.is_, now, before)):
        step = _made(k, v, *shared)
        kept["triton"] = now, shared, step
    return step


def _made(k: TokenStore | Half, v: TokenStore | Half, first: int, end: int) -> Step | None:
    heads, d = k.sinks.shape[1], k.sinks.shape[3]
    if end <= first or v.sinks.shape[3] != d or k.memory_format is None or v.memory_format is None:
        return None
    sides = k.compressor, v.compressor
    if not supported(*sides, heads, d):
        return None
    decoders = [DECODERS[side.quantizer.memory_format] for side in sides]
    ranks = tuple(side.rank(d) for side in sides)
    parts = [_part(sides, decoders, *found) for found in _parts(k, v, first, end)]
    constants = {
        "K_TILE": decoders[0].tile, "V_TILE": decoders[1].tile, "K_AXIS": decoders[0].axis, "V_AXIS": decoders[1].axis,
        "K_PAIRED": decoders[0].paired, "V_PAIRED": decoders[1].paired, "K_RANK": ranks[0], "V_RANK": ranks[1],
        "K_R": slots(ranks[0], decoders[0]), "V_R": slots(ranks[1], decoders[1]), "SHARED": k.whole is v.whole,
        "FRAMED": sides[0].frame is not None,
        "enable_fp_fusion": True,  # said, because Triton changes its default in 3.10 and warns of that in 3.9
    }  # fmt: skip
    kernel = (*(side.quantizer.memory_format for side in sides), *ranks, heads, d)
    return Step(
        first, end, heads, sides[0].groups(heads, d), d, ranks, kernel, parts, sum(part.tiles for part in parts),
        min(decoder.stages for decoder in decoders), constants,
    )  # fmt: skip


def supported(k: Compressor, v: Compressor, kv_heads: int, head_dim: int) -> bool:
    """Whether there are kernels for K and V of these compressors."""
    for compressor in (k, v):
        if compressor.quantizer.memory_format not in DECODERS or compressor.frame not in (None, TILE.value):
            return False
        if compressor.rank(head_dim) > MOST_CHANNELS:
            return False
    return k.groups(kv_heads, head_dim) == v.groups(kv_heads, head_dim)


def slots(rank: int, decoder: Decoder) -> int:
    """Channels of a tile: a power of two, at least 16, which is the least that a dot product takes."""
    if decoder.paired:
        return 2 * max(triton.next_power_of_2((rank + 1) // 2), 8)
    return max(triton.next_power_of_2(rank), 16)


def _part(
    sides: tuple[Compressor, Compressor], decoders: list[Decoder], first: int, end: int, *chunks: tuple[int, Encoded]
) -> Part:
    """Tokens [first, end) of chunks of K and of V, each with the position of its first slot."""
    aligned = any(side.block_tokens == TILE.value for side in sides)
    base = first // TILE.value * TILE.value if aligned else first
    (k, k_room), (v, v_room) = (_as_chunks(encoded) for _, encoded in chunks)
    fields = (
        decoder.arguments(side.quantizer.kernel_tensors(encoded))
        for decoder, side, encoded in zip(decoders, sides, (k, v), strict=True)
    )
    tile_bytes = sum(
        math.prod(x.shape[3:]) * x.element_size() * TILE.value // side.block_tokens
        for side, encoded in zip(sides, (k, v), strict=True)
        for x in encoded.values()
    )
    dtypes = tuple(next(iter(encoded.values())).dtype for encoded in (k, v))
    starts = tuple(start for start, _ in chunks)
    tiles = triton.cdiv(end - base, TILE.value)
    return Part(first, end, base, tiles, starts, (*fields, k_room, v_room), dtypes, tile_bytes)


def _as_chunks(encoded: Encoded) -> tuple[Encoded, int]:
    """Tensors with the strides that a kernel expects, copied only where they differ; entries allocated per group."""
    if not all(_is_chunk(x) for x in encoded.values()):
        encoded = {name: x.contiguous() for name, x in encoded.items()}
    x = next(iter(encoded.values()))
    B, G, n = x.shape[:3]
    return encoded, x.stride(1) // x.stride(2) if G > 1 else x.stride(0) // x.stride(2) if B > 1 else n


def _is_chunk(x: Tensor) -> bool:
    """Whether x [B, G, n, …] is contiguous except for unused entries after the n-th."""
    B, G = x.shape[:2]
    return x[0, 0].is_contiguous() and (B == 1 or G == 1 or x.stride(0) == G * x.stride(1))


def _shared_range(k: TokenStore, v: TokenStore) -> tuple[int, int]:
    """Positions [first, end) of tokens that both stores have compressed; (0, 0) where that would cut a block."""
    ranges = [(s.sinks.shape[2], s.sinks.shape[2] + s.compressed_tokens) for s in (k, v)]
    shared = max(first for first, _ in ranges), min(end for _, end in ranges)
    cut = any(own != shared and store.compressor.block_tokens > 1 for store, own in zip((k, v), ranges, strict=True))
    return (0, 0) if cut else shared


def _spans(store: TokenStore) -> Iterator[tuple[int, int, Encoded]]:
    """Chunks as (position of the first slot, position after the last slot, tensors)."""
    for start, encoded in store.chunks():
        yield start, start + store.compressor.block_tokens * next(iter(encoded.values())).shape[2], encoded


def _parts(
    k: TokenStore, v: TokenStore, first: int, end: int
) -> Iterator[tuple[int, int, tuple[int, Encoded], tuple[int, Encoded]]]:
    """Tokens [first, end), cut wherever a chunk of K or of V ends: where each begins and ends, and both chunks."""
    both = [list(_spans(store)) for store in (k, v)]
    cuts = {first, end, *(stop for spans in both for _, stop, _ in spans if first < stop < end)}
    for a, b in pairwise(sorted(cuts)):
        own_k, own_v = (next((start, x) for start, stop, x in spans if start <= a < stop) for spans in both)
        yield a, b, own_k, own_v

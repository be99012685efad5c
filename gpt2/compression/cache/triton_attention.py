"""Attention over two stores with Triton: the same as `direct_attention.attend`, in one pass over what is stored.

Tokens that both stores have compressed go through the kernels. Exact sinks and tail, a few dozen tokens, go through
PyTorch, and so do tokens that only one of the two stores has compressed. One softmax is over both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError, OutOfResources

from gpt2.compression.cache import attention_math
from gpt2.compression.cache.token_store import Half, TokenStore
from gpt2.compression.codecs import Compressor
from gpt2.compression.codecs.base import Encoded
from gpt2.compression.kernels import dispatch, triton_frames
from gpt2.compression.kernels.triton_kernels import attend_tiles, merge_splits
from gpt2.compression.kernels.triton_tiles import DECODERS, MOST_CHANNELS, TILE, Decoder

log = logging.getLogger(__name__)
MOST_ROWS = 64  # queries of a group
LEAST_TILES = 2  # of a split; with fewer, a program writes about as much as it reads
PROGRAMS = 4  # per multiprocessor, so that some compute while others wait for memory
STAGE_BYTES = 64 * 1024  # of shared memory, for tiles that are loaded ahead
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


without_kernel: set[tuple] = set()  # kernels that need more shared memory than the device has, or don't compile for it


class Part(NamedTuple):
    """Tokens that are compressed in both stores: positions [first, end), and the chunks of K and of V that hold them.

    k, v: position of the chunk's first slot, and its tensors.
    """

    first: int
    end: int
    k: tuple[int, Encoded]
    v: tuple[int, Encoded]


def attend(
    k: TokenStore | Half, v: TokenStore | Half, query: Tensor, mask: Tensor | None, scaling: float, *,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """As `direct_attention.attend`; None where there is no kernel for it."""
    first, end = _shared_range(k, v)
    if v.sinks.shape[3] != query.shape[-1] or bool(k.own_sinks) != bool(v.own_sinks):  # K and V differ in head_dim
        return None
    if k.memory_format is None or v.memory_format is None:
        return None
    if end <= first or not supported(k.compressor, v.compressor, query, k.sinks.shape[1]):
        return None
    B, heads, Q, d = query.shape
    H, T = k.sinks.shape[1], len(k)
    mask = attention_math.causal(Q, T, query.device) if mask is None else mask[..., :T]
    own = _own_sinks(k, v) if k.own_sinks else None
    own_mask = None
    if own is not None:
        own_mask, mask = own.masks(mask, T)
    mask = None if mask is None else mask.expand(B, heads, Q, T)
    M = heads // H * Q
    q = (query * scaling).reshape(B, H, M, d)
    coded = ((own.quantizer.memory_format, _rank(own, d)) for own in (k.compressor, v.compressor))
    kernel = (*coded, query.dtype, M, d, query.device)
    if kernel in without_kernel:
        return None
    try:
        parts = list(_parts(k, v, first, end))
        with torch.cuda.device_of(q):  # Triton launches on the current device, which may not be that of this layer
            y, inside = attend_compressed(q, parts, k, v, mask, softcap)
    except OutOfResources as error:  # such as for many queries of wide heads in float32
        log.info("no kernel for %s: %s", kernel, error)
        without_kernel.add(kernel)
        return None
    except InterpreterError:
        raise
    except TritonError as error:  # of Triton's compiler or of ptxas, which differ from version to version
        log.warning("Triton can't compile a kernel for %s, so PyTorch takes its place, slower: %s", kernel, error)
        without_kernel.add(kernel)
        return None
    inside = inside.view(B, heads, Q, 1)
    x = attention_math.capped(_outside_scores(k, q, first, end).view(B, heads, Q, -1), softcap)
    if mask is not None:
        x = attention_math.masked(x, torch.cat((mask[..., :first], mask[..., end:]), dim=-1))
    if own is not None:
        scores = (q.float() @ own.k.float().mT).view(B, heads, Q, -1)
        x = torch.cat((x, attention_math.masked(attention_math.capped(scores, softcap), own_mask)), dim=-1)
    total = torch.logaddexp(inside, x.logsumexp(-1, keepdim=True)) if x.shape[-1] else inside
    if sinks is not None:  # a sink logit takes part in the softmax without a token of its own (gpt-oss)
        total = torch.logaddexp(total, sinks.float().view(1, -1, 1, 1))
    p, share = (x - total).exp().view(B, H, M, x.shape[-1]), (inside - total).exp().view(B, H, M, 1)
    out = _outside_sum(v, p[..., : T - (end - first)], first, end)
    if own is not None:
        out += p[..., T - (end - first) :].to(own.v.dtype) @ own.v
    share = share.view(*y.shape[:3], 1)
    out += _reconstructed_sum(v.compressor, y * share, share, d)
    return out.view(B, heads, Q, d).to(query.dtype)


class OwnSinks(NamedTuple):
    """Sinks of padded rows, exact: K and V [B, H, n, d], their places among the tokens held, and which there are.

    Places and whether there is one, [B, n]: rows have different numbers of them.
    """

    k: Tensor
    v: Tensor
    places: Tensor
    there: Tensor

    def masks(self, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
        """A mask [B or 1, Hq or 1, Q, T] or [Q, T] for the sinks, [B, …, n], and one that hides them, [B, …, T]."""
        B, n = self.places.shape
        where = self.places.masked_fill(~self.there, tokens)  # a place of its own for those that there aren't
        hidden = torch.zeros(B, tokens + 1, dtype=torch.bool, device=where.device).scatter_(1, where, True)
        hidden, there = hidden[:, None, None, :tokens], self.there[:, None, None]
        if mask is None:
            return there, ~hidden
        mask = mask[None, None] if mask.ndim == 2 else mask
        mask = mask.expand(B, *mask.shape[1:])
        own = mask.gather(3, self.places[:, None, None].expand(-1, *mask.shape[1:3], n))
        if mask.dtype == torch.bool:
            return own & there, mask & ~hidden
        lowest = torch.finfo(mask.dtype).min
        return own.masked_fill(~there, lowest), mask.masked_fill(hidden, lowest)


def _own_sinks(k: TokenStore | Half, v: TokenStore | Half) -> OwnSinks:
    """The sinks of padded rows, with padding beside them that larger blocks store other tokens in the place of."""
    wider = max((k, v), key=lambda store: store.compressor.block_tokens)
    numbers, places, there = wider.own_sinks.apart(wider.forgotten, len(wider))
    index = numbers[:, None, :, None]
    held = (store.own_sinks.tokens[:, store.heads] for store in (k, v))
    return OwnSinks(*(x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in held), places, there)


def supported(k: Compressor, v: Compressor, query: Tensor, kv_heads: int) -> bool:
    """Whether there are kernels for K and V of these compressors and for queries [B, Hq, Q, d]."""
    if query.dtype not in DTYPES or (query.requires_grad and torch.is_grad_enabled()):
        return False
    for compressor in (k, v):
        if compressor.quantizer.memory_format not in DECODERS or compressor.frame not in (None, TILE.value):
            return False
        if _rank(compressor, query.shape[-1]) > MOST_CHANNELS:
            return False
    groups = k.groups(kv_heads, query.shape[-1])
    rows = query.shape[1] * query.shape[2] // groups
    return rows <= MOST_ROWS and groups == v.groups(kv_heads, query.shape[-1])


def attend_compressed(
    q: Tensor, parts: list[Part], k_store: TokenStore | Half, v_store: TokenStore | Half, mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of q [B, H, M, d] over compressed tokens alone, with a softmax of their own; mask [B, Hq, Q, T].

    Returns Σ p ẑ of V, [B, G, H/G · M, r], and the logarithm of each sum of exponentials, [B, G, H/G · M].
    """
    k, v = k_store.compressor, v_store.compressor
    absorbed, bias = _absorbed(k_store, q)
    (B, G), M = absorbed.shape[:2], absorbed.shape[-2]
    aligned = TILE.value in (k.block_tokens, v.block_tokens)
    bases = [part.first // TILE.value * TILE.value if aligned else part.first for part in parts]
    tiles = [-(-(part.end - base) // TILE.value) for part, base in zip(parts, bases, strict=True)]
    each = _tiles_each(sum(tiles), B * G, q.device)
    splits = [-(-n // each) for n in tiles]
    rank = _rank(v, q.shape[-1])
    # Apart: Triton compiles a kernel anew where the address of a half is no multiple of 16, at some numbers of splits
    maxima, sums = (q.new_empty(sum(splits), B * G, M, dtype=torch.float32) for _ in range(2))
    accs = q.new_empty(sum(splits), B * G, M, rank, dtype=torch.float32)
    launch = _Launch(absorbed, bias, mask, softcap, k, v, q, parts[0].k[0], k_store.whole is v_store.whole)
    for i, part in enumerate(parts):
        launch(part, (maxima, sums, accs), bases[i], sum(splits[:i]), tiles[i], each)
    y, logsum = accs.new_empty(B, G, M, rank), accs.new_empty(B, G, M)
    merge_splits[(B * G * M,)](
        maxima, sums, accs, y, logsum, sum(splits), RANK=rank, R=triton.next_power_of_2(rank), enable_fp_fusion=True
    )
    return y, logsum


def _absorbed(store: TokenStore | Half, q: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, H, M, d] as K's codes are compared with it, [B, G, M, r], and what is added to scores, [B, G, M] float32.

    Both with a dimension of frames behind G where frames have queries of their own, which may be in bfloat16.
    """
    k, d = store.compressor, q.shape[-1]
    rotation = None if k.frame is None else k.transform.frame_rotation(*store.frames())
    if rotation is not None:
        basis = k.transform.derived("read", d, lambda: k.transform.read_basis(d).float().contiguous())
        return triton_frames.absorbed(q, basis, *rotation, dispatch.rounds_queries(q.dtype, k))
    x, rank = k.absorb_query(q, None if k.frame is None else store.frame_starts(q.device)).float(), _rank(k, d)
    bias = x[..., rank].contiguous() if k.affine else x.new_zeros(x.shape[:-1])
    return x[..., :rank].contiguous(), bias


class _Launch:
    """The arguments that all calls of the kernel have in common; each call is for one part.

    absorbed [B, G, M, r], bias [B, G, M], or with a dimension of frames behind G, of which the first are of the tile at
    position first_slot. shared: whether V has K's codes.
    """

    def __init__(self, absorbed: Tensor, bias: Tensor, mask: Tensor | None, softcap: float | None, k: Compressor,
                 v: Compressor, q: Tensor, first_slot: int, shared: bool):  # fmt: skip
        self.absorbed, self.bias, self.dtype, self.k, self.v = absorbed, bias, q.dtype, k, v
        self.groups, self.M, self.k_rank = absorbed.shape[1], *absorbed.shape[-2:]
        self.frames = absorbed.shape[2] if absorbed.ndim == 5 else 1
        self.first_slot = first_slot
        self.v_rank = _rank(v, q.shape[-1])
        self.decoders = DECODERS[k.quantizer.memory_format], DECODERS[v.quantizer.memory_format]
        rows = max(triton.next_power_of_2(self.M), 16)
        self.sizes = {
            "K_RANK": self.k_rank, "V_RANK": self.v_rank, "ROWS": rows, "SOFTCAP": softcap is not None,
            "FRAMED": absorbed.ndim == 5, "SHARED": shared,
            "K_R": slots(self.k_rank, self.decoders[0]), "V_R": slots(self.v_rank, self.decoders[1]),
            # Queries that a basis has made float32, or that are multiplied by scales, need more than 16 bits, or are
            # rounded to float16's eleven
            "SPLIT": not dispatch.rounds_queries(self.dtype, k)
            and (k.transform is not None or self.decoders[0].axis != 0 or self.dtype != torch.bfloat16),
            "SPLIT_P": self.dtype == torch.float32,
        }  # fmt: skip
        self.softcap = softcap or 1.0
        self._set_mask(mask, absorbed.shape[0])

    def _set_mask(self, mask: Tensor | None, batch: int) -> None:
        """mask [B, Hq, Q, T], with strides of 0 where it is the same for all heads or queries."""
        self.mask, self.strides, self.heads, self.queries = self.bias, (0, 0, 0, 0), self.M, 1
        self.sizes["MASK"] = 0
        if mask is None:
            return
        self.mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        self.strides = self.mask.stride()
        self.heads, self.queries = mask.shape[1] // self.groups, mask.shape[2]
        same = all(n == 1 or not stride for n, stride in zip(mask.shape[1:3], self.strides[1:3], strict=True))
        self.sizes["MASK"] = 1 if same else 2

    def __call__(self, part: Part, out: tuple[Tensor, ...], base: int, first_split: int, tiles: int, each: int) -> None:
        (k_start, k_encoded), (v_start, v_encoded) = part.k, part.v
        (k_encoded, k_room), (v_encoded, v_room) = _as_chunks(k_encoded), _as_chunks(v_encoded)
        own_k, own_v = self.decoders
        grid = (self.absorbed.shape[0] * self.groups, -(-tiles // each))
        attend_tiles[grid](
            self.absorbed, self.bias, self.mask, *out, own_k.arguments(self.k.quantizer.kernel_tensors(k_encoded)),
            own_v.arguments(self.v.quantizer.kernel_tensors(v_encoded)), k_room, v_room, base, part.first, part.end,
            k_start, v_start, first_split, tiles, each, self.frames, self.first_slot, self.M, self.groups, self.heads,
            self.queries, *self.strides, self.softcap,
            K_TILE=own_k.tile, V_TILE=own_v.tile, K_AXIS=own_k.axis, V_AXIS=own_v.axis, K_PAIRED=own_k.paired,
            V_PAIRED=own_v.paired, K_DTYPE=self._codes_dtype(k_encoded), V_DTYPE=self._codes_dtype(v_encoded),
            **self.sizes, **self._resources(k_encoded, v_encoded),
        )  # fmt: skip

    def _codes_dtype(self, encoded: Encoded) -> tl.dtype:
        """Dtype of dot products: the model's for exact tokens, float16 for codes, which represents them exactly."""
        return DTYPES.get(next(iter(encoded.values())).dtype, tl.float16)

    def _resources(self, k_encoded: Encoded, v_encoded: Encoded) -> dict[str, int | bool]:
        """Number of warps, and of tiles that are loaded ahead, as shared memory allows."""
        tile = sum(
            math.prod(x.shape[3:]) * x.element_size() * TILE.value // compressor.block_tokens
            for compressor, encoded in ((self.k, k_encoded), (self.v, v_encoded))
            for x in encoded.values()
        )
        large = self.sizes["ROWS"] * max(self.sizes["K_R"], self.sizes["V_R"]) > 4096
        stages = min(STAGE_BYTES // tile, *(decoder.stages for decoder in self.decoders))
        # Said, because Triton changes its default in 3.10 and warns of that in 3.9
        return {"num_warps": 8 if large else 4, "num_stages": max(1, stages), "enable_fp_fusion": True}


def slots(rank: int, decoder: Decoder) -> int:
    """Channels of a tile: a power of two, at least 16, which is the least that a dot product takes."""
    if decoder.paired:
        return 2 * max(triton.next_power_of_2((rank + 1) // 2), 8)
    return max(triton.next_power_of_2(rank), 16)


def _rank(compressor: Compressor, head_dim: int) -> int:
    return compressor.transform.rank if compressor.transform else head_dim


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles_each(tiles: int, groups: int, device: torch.device) -> int:
    """Tiles of a split, such that the splits of all groups keep the device busy."""
    if device.type != "cuda":  # in Triton's interpreter
        return LEAST_TILES
    splits = max(PROGRAMS * _multiprocessors(device) // groups, 1)
    return max(-(-tiles // splits), LEAST_TILES)


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


def _parts(k: TokenStore, v: TokenStore, first: int, end: int) -> Iterator[Part]:
    """Tokens [first, end), cut wherever a chunk of K or of V ends."""
    both = [list(_spans(store)) for store in (k, v)]
    cuts = {first, end, *(stop for spans in both for _, stop, _ in spans if first < stop < end)}
    for a, b in pairwise(sorted(cuts)):
        own_k, own_v = (next((start, x) for start, stop, x in spans if start <= a < stop) for spans in both)
        yield Part(a, b, own_k, own_v)


def _outside(store: TokenStore, first: int, end: int) -> Iterator[tuple[slice, Tensor | Encoded]]:
    """What a store holds outside positions [first, end): places among those tokens, and exact tokens [B, H, n, d] or
    encoded ones.
    """
    S, rest = store.sinks.shape[2], store.tail.shape[2]
    if S:
        yield slice(0, S), store.sinks
    for start, stop, encoded in _spans(store):
        for a, b, gone in ((max(start, S), min(stop, first), 0), (max(start, end), stop, end - first)):
            if a < b:
                yield slice(a - gone, b - gone), {name: x[:, :, a - start : b - start] for name, x in encoded.items()}
    if rest:
        last = len(store) - (end - first)
        yield slice(last - rest, last), store.tail


def _outside_scores(store: TokenStore, q: Tensor, first: int, end: int) -> Tensor:
    """q · k̂ of tokens outside [first, end), [B, H, M, n] float32."""
    out = q.new_empty(*q.shape[:3], len(store) - (end - first), dtype=torch.float32)
    for place, held in _outside(store, first, end):
        if isinstance(held, Tensor):
            # In float32: exact sinks take much of the attention, and of scores 16 bits leave too little
            out[..., place] = q.float() @ held.float().mT
        else:
            absorbed = store.compressor.absorb_query(q)  # tokens coded one by one, so that there are no frames
            own = out[..., place].unflatten(1, (absorbed.shape[1], -1)).flatten(2, 3)
            store.compressor.scores(absorbed, held, own)
    return out


def _outside_sum(store: TokenStore, p: Tensor, first: int, end: int) -> Tensor:
    """Σ p v̂ of tokens outside [first, end), [B, H, M, d] float32; p [B, H, M, n]."""
    compressor, d = store.compressor, store.sinks.shape[3]
    groups = compressor.groups(p.shape[1], d)
    total = p.new_zeros(*p.shape[:3], d)
    for place, held in _outside(store, first, end):
        part = p[..., place]
        if isinstance(held, Tensor):
            total += part.to(held.dtype) @ held
        else:
            grouped = part.unflatten(1, (groups, -1)).flatten(2, 3)
            y = compressor.quantizer.weighted_sum(grouped, held, _rank(compressor, d))
            total += _reconstructed_sum(compressor, y, grouped.sum(-1, keepdim=True), d)
    return total


def _reconstructed_sum(v: Compressor, y: Tensor, share: Tensor, head_dim: int) -> Tensor:
    """Sums of ẑ, y [B, G, H/G · M, r], and of their weights, share [B, G, H/G · M, 1] → sums of x̂, [B, H, M, d]."""
    return v.reconstruct_sum(torch.cat((y, share), dim=-1) if v.affine else y, head_dim)

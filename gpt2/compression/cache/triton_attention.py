"""Attention over two stores with Triton: the same as `direct_attention.attend`, in one pass over what is stored.

At most three kernels: `absorb_frames` where frames of tokens have queries of their own, `attend_tiles` for tokens that
both stores have compressed, and `merge_splits`, which adds exact sinks and tail, a few dozen tokens. Every operation
beside them would take the host's time, in each layer and step.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError, OutOfResources

from gpt2.compression.cache import attention_math
from gpt2.compression.cache.token_store import Half, TokenStore
from gpt2.compression.cache.triton_step import Part, Step, step_of
from gpt2.compression.kernels import dispatch, triton_frames
from gpt2.compression.kernels.triton_kernels import attend_tiles
from gpt2.compression.kernels.triton_merge import COLUMNS, merge_splits

log = logging.getLogger(__name__)
MOST_ROWS = 64  # queries of a group
LEAST_TILES = 2  # of a split; with fewer, a program writes about as much as it reads
PROGRAMS = 4  # per multiprocessor, so that some compute while others wait for memory
STAGE_BYTES = 64 * 1024  # of shared memory, for tiles that are loaded ahead
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


without_kernel: set[tuple] = set()  # kernels that need more shared memory than the device has, or don't compile for it


def attend(
    k: TokenStore | Half, v: TokenStore | Half, query: Tensor, mask: Tensor | None, scaling: float, *,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """As `direct_attention.attend`; None where there is no kernel for it."""
    step = step_of(k, v)
    if step is None or not takes(step, query):
        return None
    (B, heads, Q, d), T = query.shape, len(k)
    kernel = (step.kernel, query.dtype, Q, query.device)
    if kernel in without_kernel:
        return None
    mask = attention_math.causal(Q, T, query.device) if mask is None else mask[..., :T]
    own = own_mask = None
    if k.own_sinks or v.own_sinks:
        own = _own_sinks(k, v)
        own_mask, mask = own.masks(mask, T)
    masked = Mask.of(mask, (B, heads, Q, T)), own, Mask.of(own_mask, (B, heads, Q, -1))
    call = _Call(float(scaling), softcap, None if sinks is None else sinks.contiguous(), Q, *masked)
    try:
        with torch.cuda.device_of(query):  # Triton launches on the current device, perhaps not that of this layer
            out = attend_stored(step, k, v, query.reshape(B, step.heads, -1, d).contiguous(), call)
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
    return out.view(B, heads, Q, d)


class _Call(NamedTuple):
    """What a call of `attend` has besides tokens and queries. queries: Q, of each query head. own: of padded rows."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None
    queries: int
    mask: Mask
    own: OwnSinks | None
    own_mask: Mask


class Mask(NamedTuple):
    """A mask [B, Hq, Q, T] as kernels read it: of bytes or of numbers, with strides of 0 where it is the same.

    kind: 0 where there is none, 1 where it is the same for all heads and queries, 2 where it isn't.
    """

    x: Tensor | None
    strides: tuple[int, ...]
    kind: int

    @classmethod
    def of(cls, mask: Tensor | None, shape: tuple[int, ...]) -> Mask:
        if mask is None:
            return NO_MASK
        mask = mask.expand(shape)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        strides = mask.stride()
        same = all(n == 1 or not stride for n, stride in zip(mask.shape[1:3], strides[1:3], strict=True))
        return cls(mask, strides, 1 if same else 2)


NO_MASK = Mask(None, (0, 0, 0, 0), 0)


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
    """The sinks of padded rows, with padding beside them that larger blocks store other tokens in the place of.

    A store whose codec is exact has them where all its tokens are.
    """
    wider = max((k, v), key=lambda store: (bool(store.own_sinks), store.compressor.block_tokens))
    numbers, places, there = wider.own_sinks.apart(wider.forgotten, len(wider))
    held = []
    for store in (k, v):
        if store.own_sinks:
            x, own = store.own_sinks.tokens[:, store.heads], numbers
        else:
            x, own = store.between(0, min(wider.own_sinks.end - wider.forgotten, len(store))), places
        held.append(x.gather(2, own[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])))
    return OwnSinks(*held, places, there)


def takes(step: Step, query: Tensor) -> bool:
    """Whether there are kernels for queries [B, Hq, Q, d]."""
    if query.dtype not in DTYPES or (query.requires_grad and torch.is_grad_enabled()):
        return False
    return query.shape[3] == step.head_dim and query.shape[1] * query.shape[2] <= MOST_ROWS * step.groups


def attend_stored(step: Step, k: TokenStore | Half, v: TokenStore | Half, q: Tensor, call: _Call) -> Tensor:
    """Attention of q [B, H, M, d] over what two stores hold, of the same shape."""
    absorbed, bias = _absorbed(k, q)
    (B, G), M = absorbed.shape[:2], absorbed.shape[-2]
    each = _tiles_each(step.tiles, B * G, q.device)
    splits = [-(-part.tiles // each) for part in step.parts]
    partial = q.new_empty(sum(splits) * B * G * M * (step.ranks[1] + 2), dtype=torch.float32)
    constants = _constants(step, k, q.dtype, absorbed, bias, call)
    for i, part in enumerate(step.parts):
        grid = (B * G, splits[i])
        _attend_tiles(grid, step, part, sum(splits[:i]), sum(splits), each, absorbed, bias, partial, call, constants)
    return _merged(step, k, v, q, partial, sum(splits), call)


def _absorbed(store: TokenStore | Half, q: Tensor) -> tuple[Tensor, Tensor | None]:
    """q [B, H, M, d] as K's codes are compared with it, [B, G, M, r or r + 1], with a dimension of frames behind G
    where frames have queries of their own; and what is added to scores, [B, G, M] float32, where it isn't the last
    coordinate. Of frames, queries may be in bfloat16."""
    k, d = store.compressor, q.shape[-1]
    if k.transform is None:
        return q, None
    rotation = None if k.frame is None else k.transform.frame_rotation(*store.frames())
    if rotation is not None:
        basis = k.transform.derived("read", d, lambda: k.transform.read_basis(d, keep=False).float().contiguous())
        return triton_frames.absorbed(q, basis, *rotation, dispatch.rounds_queries(q.dtype, k))
    return k.absorb_query(q, None if k.frame is None else store.frame_starts(q.device)).float().contiguous(), None


def _constants(
    step: Step, k: TokenStore | Half, dtype: torch.dtype, absorbed: Tensor, bias: Tensor | None, call: _Call
) -> dict[str, Any]:
    """Constants of `attend_tiles` that a call decides."""
    rows = max(triton.next_power_of_2(absorbed.shape[-2]), 16)
    own, axis = k.compressor, step.constants["K_AXIS"]
    return {
        "ROWS": rows, "BIAS": 0 if own.transform is None else 2 if bias is None else 1, "MASK": call.mask.kind,
        "SOFTCAP": call.softcap is not None,
        # Queries that a basis has made float32, or that are multiplied by scales, need more than 16 bits, or are
        # rounded to float16's eleven
        "SPLIT": not dispatch.rounds_queries(dtype, own)
        and (own.transform is not None or axis != 0 or dtype != torch.bfloat16),
        "SPLIT_P": dtype == torch.float32,
        "num_warps": 8 if rows * max(step.constants["K_R"], step.constants["V_R"]) > 4096 else 4,
    } | step.constants  # fmt: skip


def _attend_tiles(
    grid: tuple[int, int], step: Step, part: Part, first_split: int, splits: int, each: int, absorbed: Tensor,
    bias: Tensor | None, partial: Tensor, call: _Call, constants: dict[str, Any],
) -> None:  # fmt: skip
    """Launch the kernel for one part; the rest as `attend_tiles` has it."""
    M, mask = absorbed.shape[-2], call.mask
    heads = M // call.queries  # as rows of a group are: whole query heads, each with its queries
    attend_tiles[grid](
        absorbed, partial if bias is None else bias, partial if mask.x is None else mask.x, partial, splits,
        *part.arguments, part.base, part.first, part.end, *part.starts, first_split, part.tiles, each,
        absorbed.shape[2] if step.constants["FRAMED"] else 1, step.parts[0].starts[0], M, step.groups, heads,
        call.queries, *mask.strides, call.scaling, call.softcap or 1.0,
        K_DTYPE=DTYPES.get(part.dtypes[0], tl.float16), V_DTYPE=DTYPES.get(part.dtypes[1], tl.float16),
        num_stages=max(1, min(STAGE_BYTES // part.tile_bytes, step.stages)), **constants,
    )  # fmt: skip


def _merged(
    step: Step, k: TokenStore | Half, v: TokenStore | Half, q: Tensor, partial: Tensor, splits: int, call: _Call
) -> Tensor:
    """Attention over all tokens, of partial results over compressed ones, [B, H, M, d] as q."""
    (B, H, M, d), rank, own = q.shape, step.ranks[1], call.own
    transform = v.compressor.transform
    basis = None if transform is None else transform.derived(
        "summed", d, lambda: transform.summed_basis(d, keep=False).float().contiguous()
    )  # fmt: skip
    sides = [_outside(store, step.first, step.end) for store in (k, v)]
    exact = [side[i] for i in (0, 1) for side in sides] + ([q, q] if own is None else [own.k, own.v])
    masks = (partial if mask.x is None else mask.x for mask in (call.mask, call.own_mask))
    D, out = triton.next_power_of_2(d), torch.empty_like(q)
    merge_splits[(B * H * M,)](
        partial, out, q, partial if basis is None else basis, *exact, *masks,
        partial if call.sinks is None else call.sinks, splits, exact[0].shape[2], exact[2].shape[2],
        0 if own is None else own.k.shape[2], step.end, *(x.stride(0) for x in exact[:4]), H, M, call.queries,
        1 if basis is None else basis.shape[0] * basis.shape[1], *call.mask.strides, *call.own_mask.strides,
        call.scaling, call.softcap or 1.0, RANK=rank, COLUMNS=D if basis is None else COLUMNS, HEAD_DIM=d, D=D,
        BASIS=basis is not None, MASK=call.mask.kind > 0, OWN=own is not None, LOGITS=call.sinks is not None,
        SOFTCAP=call.softcap is not None, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _outside(store: TokenStore | Half, first: int, end: int) -> tuple[Tensor, Tensor]:
    """A store's tokens before position `first` and from `end` on, [B, H, n, d] each: exact ones, and in a store whose
    tokens are coded one by one also what is read of those that the other store has exact."""
    before = store.sinks if store.sinks.shape[2] == first else store.between(0, first)
    held = len(store)
    after = store.tail if store.tail.shape[2] == held - end else store.between(end, held)
    return _in_rows(before), _in_rows(after)


def _in_rows(x: Tensor) -> Tensor:
    """x [B, H, n, d], copied unless only the batch may have any stride."""
    _, _, n, d = x.shape
    return x if x.stride()[1:] == (n * d, d, 1) else x.contiguous()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles_each(tiles: int, groups: int, device: torch.device) -> int:
    """Tiles of a split, such that the splits of all groups keep the device busy."""
    if device.type != "cuda":  # in Triton's interpreter
        return LEAST_TILES
    splits = max(PROGRAMS * _multiprocessors(device) // groups, 1)
    return max(-(-tiles // splits), LEAST_TILES)

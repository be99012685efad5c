"""Attention over what a cache stores: queries are compared with the codes, and the history is not reconstructed.

    q · k̂ = q' · ẑ + q · mean        the query absorbs the basis of K, once per step, or once per frame of tokens
    Σ p v̂ = (Σ p ẑ) D + Σ p · mean   the basis of V is applied once per query, not once per cached token

Exact sinks, compressed blocks and the exact tail write their scores into one row, so that one softmax is over all.
The first block may begin with `lead` padding slots, at the positions of the last sinks: see TokenStore.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.compression.cache import attention_math
from gpt2.compression.cache.attention_math import probabilities
from gpt2.compression.cache.token_store import Half, TokenStore, placed
from gpt2.compression.codecs.base import Encoded
from gpt2.compression.kernels import cpu, dispatch


def attend(
    k: TokenStore | Half, v: TokenStore | Half, query: Tensor, mask: Tensor | None, scaling: float, *,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of query [B, Hq, Q, d] over the visible tokens of two stores, [B, Hq, Q, dv] in the query's dtype.

    k, v: the stores of K and of V, or the halves of one that holds both.

    mask: True where a query may look, or numbers to be added to scores; broadcasts to [B, Hq, Q, T]. None is causal,
    where the last query is that of the last token held. sinks: sink logits (gpt-oss), one per query head, [Hq].
    """
    if k.hidden:
        mask = attention_math.behind_hidden(mask, k.hidden, query.shape[2], len(k), query.device)
    if dispatch.usable(query):
        from gpt2.compression.cache import triton_attention  # here, because Triton isn't installed everywhere

        out = triton_attention.attend(k, v, query, mask, scaling, softcap=softcap, sinks=sinks)
        if out is not None:
            return out
    if (out := _in_one_pass(k, v, query, mask, scaling, softcap=softcap, sinks=sinks)) is not None:
        return out
    B, heads, Q, d = query.shape
    H = k.sinks.shape[1]
    x = scores(k, (query * scaling).reshape(B, H, -1, d)).view(B, heads, Q, -1)
    p = probabilities(x, mask, softcap, sinks)
    out = weighted_sum(v, p.view(B, H, -1, p.shape[-1]))
    return out.view(B, heads, Q, -1).to(query.dtype)


def scores(store: TokenStore | Half, q: Tensor) -> Tensor:
    """q · k̂ of every token of K's store, [B, H, M, T] float32; q [B, H, M, d], M queries per KV head."""
    out = q.new_empty((*q.shape[:3], len(store)), dtype=torch.float32)
    absorbed = absorb_query(store, q)
    blocks = _blocks(store)
    if cpu.usable(q) and blocks is not None and (not blocks or cpu.reads_frames(store.compressor.frame)):
        exact = _exact(store, len(store))
        cpu.scores(exact + blocks, [q] * len(exact) + absorbed, out)
    else:
        _scores(store, q, absorbed, out)
    if store.own_sinks:
        store.own_sinks.scores(q, out, store.forgotten, store.heads)
    return out


def absorb_query(store: TokenStore | Half, q: Tensor) -> list[Tensor]:
    """q [B, H, M, d] as K's codes are read with it, for each chunk of the store: as `Transform.absorb_query` has it.

    Where frames have absorbed queries of their own, those of all chunks are computed at once.
    """
    compressor, chunks = store.compressor, [_slots(store, encoded) for _, encoded in store.chunks()]
    if not chunks:
        return []
    if compressor.frame is None:
        return [compressor.absorb_query(q)] * len(chunks)
    whole = compressor.absorb_query(q, store.frame_starts(q.device))
    return list(whole.split([slots // compressor.frame for slots in chunks], dim=2))


def weighted_sum(store: TokenStore | Half, p: Tensor) -> Tensor:
    """Σ p v̂ over the tokens of V's store, [B, H, M, d] float32; p [B, H, M, T] float32, which it may overwrite."""
    own = store.own_sinks.take(p, store.forgotten, store.heads) if store.own_sinks else None
    blocks = _blocks(store)
    if cpu.usable(p) and blocks is not None:
        exact = _exact(store, len(store))
        total = _total(store, cpu.weighted_sums(exact + blocks, p, _outs(exact, blocks)), bool(exact))
    else:
        total = _total(store, _weighted_sum(store, p), True)
    return total if own is None else total + own


# --- with CPU kernels


def _in_one_pass(
    k: TokenStore | Half, v: TokenStore | Half, query: Tensor, mask: Tensor | None, scaling: float, *,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """As `attend`, for a decode step that one kernel can compute without storing scores; else None."""
    B, heads, Q, d = query.shape
    if Q != 1 or softcap is not None or k.own_sinks or v.own_sinks or not cpu.usable(query):
        return None
    if mask is not None and (mask.shape[:-1] not in ((1, 1, 1), (B, 1, 1)) or mask.shape[-1] < len(k)):
        return None
    step = _step(k, v, d)
    if step is None:
        return None
    together = isinstance(k, Half)
    return cpu.attend(
        step.layer, query, _absorbed(k, query) if step.absorbs else None,
        (k.whole.tail,) if together else (k.tail, v.tail), len(k.whole), scaling=scaling,
        bias=None if mask is None else _bias(mask, B, len(k)), sinks=None if sinks is None else sinks.float(),
    )  # fmt: skip


class _Step(NamedTuple):
    """What decode steps share until blocks of K or V lie elsewhere, or K has another frame.

    layer: of `cpu.layer`. absorbs: whether K's blocks are read with queries that PyTorch absorbs. The rest is what it
    was made of; placed: of `token_store`.
    """

    layer: Callable
    absorbs: bool
    k_sinks: Tensor
    v_sinks: Tensor
    placed: tuple[dict, ...]
    k_blocks: int

    def holds(self, k: TokenStore | Half, v: TokenStore | Half) -> bool:
        """Whether this was made of what the stores hold, provided that K's first tensor lies where it did."""
        if self.k_sinks is not k.whole.sinks or self.v_sinks is not v.whole.sinks:
            return False
        now = placed(k, v)
        same = len(now) == len(self.placed) and all(map(operator.is_, now, self.placed))
        return same and (k.compressor.frame is None or self.k_blocks == k.compressed_blocks)


def _step(k: TokenStore | Half, v: TokenStore | Half, head_dim: int) -> _Step | None:
    """What decode steps share; None where no kernel reads both stores."""
    first = next(iter(k.whole.blocks.values()), None)
    kept = None if first is None else first.placed.get("step")
    if kept is not None and kept.holds(k, v):
        return kept
    k_blocks, v_blocks = (_exact_blocks(side) or _blocks(side) for side in (k, v))
    if k_blocks is None or v_blocks is None or k_blocks and not cpu.reads_frames(k.compressor.frame):
        return None
    integers = cpu.integer_products()
    frames = _frames(k, head_dim, integers) if k_blocks else None
    absorbs = bool(k_blocks) and frames is None and k.compressor.transform is not None
    if absorbs and k.compressor.frame is not None:  # queries of every frame, which two passes take
        return None
    values = _values(v, integers) if v_blocks else None
    parts = [_sinks(k) + k_blocks, _sinks(v) + v_blocks]
    layer = cpu.layer(k.sinks.shape[1], *parts, values=values, frames=frames, integers=integers)
    step = _Step(layer, absorbs, k.whole.sinks, v.whole.sinks, placed(k, v), k.compressed_blocks)
    if first is not None:
        first.placed["step"] = step
    return step


def _absorbed(k: TokenStore | Half, query: Tensor) -> Tensor:
    """Queries as K's blocks are read with them, which all blocks share."""
    B, _, _, d = query.shape
    return k.compressor.absorb_query(query.reshape(B, k.sinks.shape[1], -1, d))


def _frames(store: TokenStore | Half, head_dim: int, integers: bool) -> cpu.Frames | None:
    """How the kernel absorbs queries for K's frames by itself; None where it takes queries that are absorbed.

    integers: as of `cpu.layer`.
    """
    store, transform = store.whole, store.compressor.transform
    rotation = None if store.compressor.frame is None else transform.frame_rotation(*store.frames())
    if rotation is None:
        return None

    def read() -> Tensor:
        return transform.read_basis(head_dim, keep=False).float()

    name = "panels of integers" if integers else "panels"
    panels = transform.derived(name, head_dim, lambda: cpu.panels(read(), integers))
    constant = transform.derived("constant", head_dim, lambda: read()[:, :, -1].contiguous())
    return cpu.Frames(panels, constant, *rotation)


def _values(store: TokenStore | Half, integers: bool) -> cpu.Values | None:
    """The basis of V, where there is one, as the kernel reads it. integers: as of `cpu.layer`."""
    transform, width = store.compressor.transform, store.sinks.shape[3]
    if transform is None:
        return None

    def read() -> Tensor:
        return transform.summed_basis(width, keep=False).float().contiguous()

    if not integers:
        return cpu.Values(transform.derived("values", width, read), None)
    units = transform.derived("units of values", width, lambda: cpu.units(read()))
    whole = transform.derived("values as integers", width, lambda: cpu.multiples(read(), units))
    return cpu.Values(whole, units)


def _bias(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """A mask of one query, [B or 1, 1, 1, T], as numbers that are added to scores, [B, T] float32."""
    mask = mask[:, 0, 0, :tokens]
    if mask.dtype == torch.bool:
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, lowest)
    return mask.float().expand(batch, -1).contiguous()


def _outs(exact: list[cpu.Part], blocks: list[cpu.Part]) -> list[int]:
    """For each part the index of the sum to which it is added: exact parts have one, and compressed parts have one."""
    return [0] * len(exact) + [int(bool(exact))] * len(blocks)


def _total(store: TokenStore | Half, sums: Sequence[Tensor], exact: bool) -> Tensor:
    """Σ p v̂ [B, H, M, d], of sums over exact tokens, if there are any, and then over compressed ones, if any."""
    total = sums[0] if exact else None
    if not store.compressed_tokens:
        return total
    y = store.compressor.reconstruct_sum(sums[-1], store.sinks.shape[3])
    return y if total is None else total + y


def _exact(store: TokenStore | Half, tokens: int) -> list[cpu.Part]:
    """The exact parts of a store of so many tokens, as kernels take them."""
    tail = store.tail
    return _sinks(store) + ([cpu.exact(tokens - tail.shape[2], tail)] if tail.shape[2] else [])


def _sinks(store: TokenStore | Half) -> list[cpu.Part]:
    return [cpu.exact(0, store.sinks)] if store.sinks.shape[2] else []


def _exact_blocks(store: TokenStore | Half) -> list[cpu.Part]:
    """The parts of a store whose codec is exact, for a single query: PyTorch's product of many is faster."""
    if not store.compressor.exact or store.sinks.dtype not in cpu.EXACT_DTYPES:
        return []
    return [cpu.exact(start, x) for start, encoded in store.whole.chunks() for x in encoded.values()]


def _blocks(store: TokenStore | Half) -> list[cpu.Part] | None:
    """A store's compressed parts, as kernels take them; None where no kernel reads them, or the exact ones beside."""
    store = store.whole
    if store.sinks.dtype not in cpu.EXACT_DTYPES:
        return None
    if not store.blocks:
        return []
    # Sinks and lead, which the parts' places follow from, change only where blocks do as well
    first = next(iter(store.blocks.values()))
    if "blocks" not in first.kept:
        first.kept["blocks"] = _made_blocks(store)
    return first.kept["blocks"]


def _made_blocks(store: TokenStore) -> list[cpu.Part] | None:
    compressor = store.compressor
    if not cpu.reads(store.memory_format):
        return [] if not store.compressed_tokens else None
    rank, blocks = _rank(store), []
    for start, encoded in store.chunks():
        part = cpu.coded(
            compressor.quantizer, encoded, rank=rank, start=start, length=_slots(store, encoded),
            skip=0 if blocks else store.lead, affine=compressor.affine,
        )  # fmt: skip
        blocks.append(part)
    return blocks


def _rank(store: TokenStore | Half) -> int:
    transform = store.compressor.transform
    return store.sinks.shape[3] if transform is None else transform.rank


def _slots(store: TokenStore | Half, encoded: Encoded) -> int:
    """Slots of a chunk: its tokens, and the lead where it is the first."""
    return store.compressor.block_tokens * next(iter(encoded.values())).shape[2]


# --- in PyTorch


def _scores(store: TokenStore | Half, q: Tensor, absorbed: list[Tensor], out: Tensor) -> None:
    for (start, encoded), own_q in zip(store.chunks(), absorbed, strict=True):
        grouped = out.unflatten(1, (own_q.shape[1], -1)).flatten(2, 3)  # [B, G, H/G · M, T]
        store.compressor.scores(own_q, encoded, grouped.narrow(-1, start, _slots(store, encoded)))
    # After the blocks, whose lead has written to the places of the last sinks
    S, rest = store.sinks.shape[2], store.tail.shape[2]
    if S:
        out[..., :S] = q.float() @ store.sinks.float().mT
    if rest:
        out[..., -rest:] = q.float() @ store.tail.float().mT


def _weighted_sum(store: TokenStore | Half, p: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over exact tokens, [B, H, M, d], and over compressed ones in their basis, [B, G, H/G · M, r or r + 1]."""
    S, rest, d = store.sinks.shape[2], store.tail.shape[2], store.sinks.shape[3]
    total = p.new_zeros((*p.shape[:3], d))
    for part, own in ((p[..., :S], store.sinks), (p[..., p.shape[-1] - rest :], store.tail)):
        if own.shape[2]:
            total += part.to(own.dtype) @ own
    p[..., :S] = 0  # weights of the lead's slots
    compressor, y = store.compressor, 0
    grouped = p.unflatten(1, (compressor.groups(p.shape[1], d), -1)).flatten(2, 3)
    for start, encoded in store.chunks():
        weights = grouped.narrow(-1, start, _slots(store, encoded))
        own = compressor.quantizer.weighted_sum(weights, encoded, _rank(store))
        y = y + (torch.cat((own, weights.sum(-1, keepdim=True)), dim=-1) if compressor.affine else own)
    return total, y

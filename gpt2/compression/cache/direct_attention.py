"""Attention that reads what a cache stores: queries meet the codes, and the history is never expanded.

    q · k̂ = q' · ẑ + q · mean        the basis of K is folded into the query, once a step
    Σ p v̂ = (Σ p ẑ) D + Σ p · mean   that of V is undone once per query, not once per cached token

Exact sinks, compressed blocks and the exact tail write their scores into one row, so that one softmax is over all.
Of a block that sinks have begun, its first places are no tokens: its lead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.compression.cache.attention_math import probabilities
from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.kernels import cpu, dispatch


def attend(
    k: TokenStore, v: TokenStore, query: Tensor, mask: Tensor | None, scaling: float, *,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of query [B, Hq, Q, d] over all that two stores hold, [B, Hq, Q, d] in its dtype.

    mask: bool, True where a query may look, or what is added to scores; broadcasts to [B, Hq, Q, T]. None is causal:
    the last query is the last token held. sinks: a logit of each query head, [Hq].
    """
    if dispatch.usable(query):
        from gpt2.compression.cache import triton_attention  # imports Triton, and this module

        out = triton_attention.attend(k, v, query, mask, scaling, softcap=softcap, sinks=sinks)
        if out is not None:
            return out
    B, heads, Q, d = query.shape
    H = k.sinks.shape[1]
    x = scores(k, (query * scaling).reshape(B, H, -1, d)).view(B, heads, Q, -1)
    p = probabilities(x, mask, softcap, sinks)
    out = weighted_sum(v, p.view(B, H, -1, p.shape[-1]))
    return out.view(B, heads, Q, -1).to(query.dtype)


def scores(store: TokenStore, q: Tensor) -> Tensor:
    """q · k of every token of K's store, [B, H, M, T] float32; q [B, H, M, d], M queries per KV head."""
    out = q.new_empty((*q.shape[:3], len(store)), dtype=torch.float32)
    folded = store.compressor.absorb_query(q) if store.compressed_tokens else q
    exact, blocks = _parts(store)
    if cpu.usable(q) and blocks is not None:
        cpu.scores(exact + blocks, [q] * len(exact) + [folded] * len(blocks), out)
    else:
        _scores(store, q, folded, out)
    return out


def weighted_sum(store: TokenStore, p: Tensor) -> Tensor:
    """Σ p v over the tokens of V's store, [B, H, M, d] float32; p [B, H, M, T] float32, which it may change."""
    exact, blocks = _parts(store)
    if cpu.usable(p) and blocks is not None:
        sums = cpu.weighted_sums(exact + blocks, p, [0] * len(exact) + [int(bool(exact))] * len(blocks))
        total, y = sums[0] if exact else None, sums[-1]
    else:
        total, y = _weighted_sum(store, p)
    if store.compressed_tokens:
        y = store.compressor.reconstruct_sum(y, store.sinks.shape[3])
        total = y if total is None else total + y
    return total


# --- by kernels


def _parts(store: TokenStore) -> tuple[list[cpu.Part], list[cpu.Part] | None]:
    """What a store holds as kernels take it: exact parts, and compressed ones, None where no kernel reads them."""
    if store.sinks.dtype not in cpu.EXACT_DTYPES:
        return [], None
    rest, compressor = store.tail.shape[2], store.compressor
    exact = [cpu.exact(start, x) for start, x in ((0, store.sinks), (len(store) - rest, store.tail)) if x.shape[2]]
    if not cpu.reads(compressor.quantizer.memory_format):
        return exact, [] if not store.compressed_tokens else None
    rank, blocks = _rank(store), []
    for start, fields in store.pieces():
        part = cpu.coded(
            compressor.quantizer, fields, rank=rank, start=start, length=_places(store, fields),
            skip=0 if blocks else store.lead, affine=compressor.affine,
        )  # fmt: skip
        blocks.append(part)
    return exact, blocks


def _rank(store: TokenStore) -> int:
    transform = store.compressor.transform
    return store.sinks.shape[3] if transform is None else transform.rank


def _places(store: TokenStore, fields: dict[str, Tensor]) -> int:
    return store.compressor.block_tokens * next(iter(fields.values())).shape[2]


# --- in PyTorch


def _scores(store: TokenStore, q: Tensor, folded: Tensor, out: Tensor) -> None:
    rank = _rank(store)
    grouped = out.unflatten(1, (folded.shape[1], -1)).flatten(2, 3)  # [B, G, H/G · M, T]
    for start, fields in store.pieces():
        own = grouped.narrow(-1, start, _places(store, fields))
        store.compressor.quantizer.scores(folded[..., :rank], fields, own)
        if store.compressor.affine:
            own += folded[..., rank:]
    # After the blocks, as their lead lies where the last sinks are
    S, rest = store.sinks.shape[2], store.tail.shape[2]
    if S:
        out[..., :S] = q @ store.sinks.mT
    if rest:
        out[..., -rest:] = q @ store.tail.mT


def _weighted_sum(store: TokenStore, p: Tensor) -> tuple[Tensor, Tensor]:
    """Of the exact tokens, [B, H, M, d], and of the compressed ones in their basis, [B, G, H/G · M, r] or r + 1."""
    S, rest, d = store.sinks.shape[2], store.tail.shape[2], store.sinks.shape[3]
    total = p.new_zeros((*p.shape[:3], d))
    for part, own in ((p[..., :S], store.sinks), (p[..., p.shape[-1] - rest :], store.tail)):
        if own.shape[2]:
            total += part.to(own.dtype) @ own
    p[..., :S] = 0  # the lead is no token
    compressor, y = store.compressor, 0
    grouped = p.unflatten(1, (compressor.groups(p.shape[1], d), -1)).flatten(2, 3)
    for start, fields in store.pieces():
        weights = grouped.narrow(-1, start, _places(store, fields))
        own = compressor.quantizer.weighted_sum(weights, fields, _rank(store))
        y = y + (torch.cat((own, weights.sum(-1, keepdim=True)), dim=-1) if compressor.affine else own)
    return total, y

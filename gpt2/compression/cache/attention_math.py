"""Attention over tensors, and what all ways of attending share: masks, soft capping, sink logits, softmax."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 1 << 26  # scores, of 12 bytes each at most while they become weights


def attend_reconstructed(
    key: Tensor, value: Tensor, query: Tensor, mask: Tensor | None, scaling: float, *,
    softcap: float | None = None, sinks: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """As `direct_attention.attend`, over key and value [B, H, T, d]. dropout: of attention weights, in training.

    Queries of a long prompt go one part after the other, whose scores fit into memory.
    """
    (B, heads, Q, _), T = query.shape, key.shape[2]
    step, out = max(AT_ONCE // max(B * heads * T, 1), 1), []
    for start in range(0, Q, step) if Q else [0]:
        end = min(start + step, Q)
        seen = T - (Q - end) if mask is None else T  # behind which causal queries see nothing
        own = mask if mask is None or mask.shape[-2] == 1 else mask[..., start:end, :]
        p = weights(key[:, :, :seen], query[:, :, start:end], own, scaling, softcap=softcap, sinks=sinks)
        out.append(weighted_values(torch.nn.functional.dropout(p, dropout), value[:, :, :seen]))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def weights(
    key: Tensor, query: Tensor, mask: Tensor | None, scaling: float, *, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention weights [B, Hq, Q, T] over key [B, H, T, d]; arguments as of `attend_reconstructed`."""
    B, heads, Q, d = query.shape
    x = ((query * scaling).reshape(B, key.shape[1], -1, d) @ key.mT).float().view(B, heads, Q, -1)
    return probabilities(x, mask, softcap, sinks)


def weighted_values(p: Tensor, value: Tensor) -> Tensor:
    """Sums of value [B, H, T, d] by weights p [B, Hq, Q, T], [B, Hq, Q, d]."""
    B, heads, Q, T = p.shape
    return (p.view(B, value.shape[1], -1, T).to(value.dtype) @ value).view(B, heads, Q, -1)


def probabilities(x: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention weights of scores x [B, Hq, Q, T], which may be overwritten; the rest as `direct_attention.attend`."""
    x = masked(capped(x, softcap), mask)
    p = x.softmax(-1)
    if sinks is None:
        return p
    # A sink logit takes part in the softmax without a token of its own (gpt-oss)
    return p * torch.sigmoid(x.logsumexp(-1, keepdim=True) - sinks.float().view(1, -1, 1, 1))


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Scores x [B, H, Q, T], at the smallest number of their dtype where a query may not look."""
    Q, T = x.shape[-2:]
    mask = causal(Q, T, x.device) if mask is None else mask[..., :T]
    if mask is None:
        return x
    return x.masked_fill_(~mask, torch.finfo(x.dtype).min) if mask.dtype == torch.bool else x + mask


def causal(queries: int, tokens: int, device: torch.device) -> Tensor | None:
    """Mask [Q, T] for the last `queries` of `tokens`; None for a single query, which sees all tokens."""
    if queries == 1:
        return None
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)


def behind_hidden(mask: Tensor | None, hidden: int, queries: int, tokens: int, device: torch.device) -> Tensor:
    """A mask over all `tokens` held, of which the first `hidden` lie before what `mask` covers: nobody sees those."""
    if mask is None:
        visible = causal(queries, tokens - hidden, device)
        mask = torch.ones(1, tokens - hidden, dtype=torch.bool, device=device) if visible is None else visible
    else:
        mask = mask[..., : tokens - hidden]
    unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(mask, (hidden, 0), value=unseen)


def capped(x: Tensor, softcap: float | None) -> Tensor:
    """Scores with soft capping (Gemma 2): softcap · tanh(x / softcap)."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)

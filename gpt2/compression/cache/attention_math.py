"""Attention over tensors: masks, soft capping, sink logits and softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_expanded(
    key: Tensor, value: Tensor, query: Tensor, mask: Tensor | None, scaling: float, *,
    softcap: float | None = None, sinks: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """As `attend`, over key and value [B, H, T, d]. dropout: of what queries give to tokens, in training."""
    B, heads, Q, d = query.shape
    H = key.shape[1]
    x = ((query * scaling).reshape(B, H, -1, d) @ key.mT).float().view(B, heads, Q, -1)
    p = torch.nn.functional.dropout(probabilities(x, mask, softcap, sinks), dropout)
    return (p.view(B, H, -1, p.shape[-1]).to(value.dtype) @ value).view(B, heads, Q, -1)


def probabilities(x: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """What each query gives to each token, of scores x [B, Hq, Q, T], which it may change. The rest as in `attend`."""
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = masked(x, mask)
    p = x.softmax(-1)
    if sinks is None:
        return p
    # A logit that takes its share and gives nothing (gpt-oss)
    return p * torch.sigmoid(x.logsumexp(-1, keepdim=True) - sinks.float().view(1, -1, 1, 1))


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Scores x [B, H, Q, T], with those that a query may not see at the lowest number there is."""
    Q, T = x.shape[-2:]
    if mask is None and Q > 1:
        mask = torch.ones(Q, T, dtype=torch.bool, device=x.device).tril(T - Q)
    if mask is None:
        return x
    mask = mask[..., :T]
    return x.masked_fill_(~mask, torch.finfo(x.dtype).min) if mask.dtype == torch.bool else x + mask

"""Vectors for bases that heads share, a cache checked against a reference while a model generates, and best widths."""

from __future__ import annotations

import pytest
import torch
from stores import Plain
from tiny import windows
from torch import Tensor

from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.codecs.mixed import COSTS

PRICES = torch.tensor(COSTS)


def vectors(heads: int, tokens: int, d: int = 12, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(2, heads, tokens, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reads_like_the_reference(llama, cache, tokens, tolerance: float = 1e-4, **generation) -> Tensor:
    """Generate; then every store reads as its tokens would, coded block by block. Returns the tokens.

    tolerance: share of the numbers that may differ, by codes that rounding tips over.
    """
    chunks, append, crop, map_ = {}, TokenStore.append, TokenStore.crop, TokenStore.map_

    def record(operation, original):
        def recorded(store, argument):
            chunks.setdefault(id(store), []).append((operation, argument))
            return original(store, argument)

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        for name, original in (("append", append), ("crop", crop), ("map_", map_)):
            patch.setattr(TokenStore, name, record(name, original))
        out = llama.model.generate(tokens, past_key_values=cache, do_sample=False, **{"max_new_tokens": 5} | generation)
    for layer in cache.layers:
        for store in layer.stores.values():
            reference = Plain(store.compressor, store.sink_tokens, store.recent_tokens)
            for operation, argument in chunks[id(store)]:
                getattr(reference, operation)(argument)
            assert len(store) == reference.seen.shape[2]
            same = torch.isclose(store.read(), reference.seen, rtol=1e-3, atol=1e-3)
            assert same.float().mean() > 1 - tolerance
    return out


def prompts(length: int) -> dict[str, Tensor]:
    """Two of them, which are read like the reference: it knows nothing of padding."""
    tokens = windows(2, length)
    return {"tokens": tokens, "attention_mask": torch.ones_like(tokens)}


def least(error: Tensor, budget: int) -> float:
    """The least total error of one block [r, W] within a budget, by dynamic programming over every byte."""
    best = torch.zeros(budget + 1, dtype=torch.float64)
    for own in error.double():
        options = torch.full((len(COSTS), budget + 1), float("inf"), dtype=torch.float64)
        for index, cost in enumerate(COSTS):
            options[index, cost:] = best[: max(budget + 1 - cost, 0)] + own[index]
        best = options.amin(0)
    return float(best[budget])

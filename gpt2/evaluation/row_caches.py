"""A batch whose rows are kept by caches of their own, for caches that don't know left padding.

Caches of other packages and papers store the keys of padding tokens as if they were text: they fill exact attention
sinks and groups. With a cache per row none is stored, so that a batch whose prompts are read at once gives what one
prompt at a time gives, and the model's weights are still read once per step for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from gpt2.evaluation.perplexity import CacheFactory


class RowsLayer(CacheLayerMixin):
    """One layer of a batch. rows: the same layer of each row's cache; padding: tokens on the left of each row."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, rows: Sequence[CacheLayerMixin], padding: Sequence[int]):
        super().__init__()
        self.rows, self.padding, self.tokens = list(rows), list(padding), 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new tokens, [B, H, n, d] each; return all, [B, H, T, d] each, with zeros in place of padding."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.tokens = self.tokens, self.tokens + key_states.shape[2]
        read = [
            self._update_row(row, key_states[at : at + 1], value_states[at : at + 1], max(self.padding[at] - start, 0))
            for at, row in enumerate(self.rows)
        ]
        return torch.cat([k for k, _ in read]), torch.cat([v for _, v in read])

    def _update_row(self, row: CacheLayerMixin, k: Tensor, v: Tensor, skipped: int) -> tuple[Tensor, Tensor]:
        """One row's tokens [1, H, n, d] without the first `skipped`, which are padding."""
        k, v = k[:, :, skipped:], v[:, :, skipped:]
        if k.shape[2]:  # a row may have nothing but padding so far
            k, v = row.update(k, v)
        return tuple(pad(x, (0, 0, self.tokens - x.shape[2], 0)) for x in (k, v))

    def select(self, rows: Sequence[int]) -> None:
        """Keep the rows of these numbers, in this order."""
        self.rows, self.padding = [self.rows[row] for row in rows], [self.padding[row] for row in rows]

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1


class RowsCache(Cache):
    """A cache of one batch in which each row has a cache of its own, for measurements: no beam search, no crop.

    make: one row's cache, of layers that keep all tokens; padding: padding tokens on the left of each row.
    """

    def __init__(self, make: CacheFactory, padding: Sequence[int]):
        caches = [make() for _ in padding]
        super().__init__(layers=[RowsLayer(rows, padding) for rows in zip(*(c.layers for c in caches), strict=True)])

    def select(self, rows: Tensor) -> None:
        """Keep the rows [n]."""
        for layer in self.layers:
            layer.select(rows.tolist())

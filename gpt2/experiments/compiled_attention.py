"""Attention over int4_channel as plain PyTorch compiled by `torch.compile`, for comparison with the C++ kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt2.compression.codecs.base import Encoded
from gpt2.compression.codecs.mixed import BLOCK, OCTAVE, SCALE_ZERO
from gpt2.compression.codecs.per_channel import Int4Channel


class CompiledInt4Channel(Int4Channel):
    """int4_channel, read by two compiled functions. compile_s: name of a function to seconds of its first call."""

    name = "int4_channel_compiled"
    memory_format = None  # otherwise the C++ kernels would read the codes

    def __init__(self):
        torch.compiler.reset()  # every shape is compiled separately, and PyTorch limits the number of versions
        self.compile_s: dict[str, float] = {}
        # Two functions, since softmax comes between them
        self._scores = self._timed("scores", torch.compile(int4_scores, dynamic=False))
        self._sums = self._timed("sums", torch.compile(int4_sums, dynamic=False))

    def scores(self, q: Tensor, encoded: Encoded, out: Tensor) -> None:
        out.copy_(self._scores(q.float(), **encoded))

    def weighted_sum(self, p: Tensor, encoded: Encoded, rank: int) -> Tensor:
        return self._sums(p, **encoded)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """While the block runs, compile without PyTorch's on-disk cache, so that compile times are comparable."""
        from torch._inductor.utils import fresh_cache

        with fresh_cache():
            yield

    def _timed(self, name: str, fn: Callable) -> Callable:
        def timed(*args, **fields) -> Tensor:
            if name in self.compile_s:
                return fn(*args, **fields)
            start = time.perf_counter()
            result = fn(*args, **fields)
            self.compile_s[name] = time.perf_counter() - start
            return result

        return timed


# Both functions loop over the queries of a KV head: compiled, all queries then share one unpacking of the codes, which
# takes half the time of the same sums with a dimension for queries


def int4_scores(q: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """q · ẑ, [B, G, M, T], of q [B, G, M, r]. codes, scale, offset: as stored by `codecs.per_channel`."""
    low, high, step = (codes & 15).float(), (codes >> 4).float(), _step(scale)
    rows = []
    for own in q[:, :, :, None, None].unbind(2):  # [B, G, 1, 1, r]
        scaled, bias = own * step, (own * offset.float()).sum(-1)
        rows.append(torch.cat(((scaled * low).sum(-1), (scaled * high).sum(-1)), dim=-1) + bias)
    return torch.stack(rows, dim=2).flatten(3)


def int4_sums(p: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Σ p ẑ over tokens, [B, G, M, r], of p [B, G, M, T]. codes, scale, offset: as stored by `codecs.per_channel`."""
    low, high, step = (codes & 15).float(), (codes >> 4).float(), _step(scale)[:, :, :, 0]
    rows = []
    for own in p.unflatten(-1, (-1, 2, BLOCK // 2))[..., None].unbind(2):  # [B, G, n, 2, 32, 1]
        y = (own[:, :, :, 0] * low).sum(-2) + (own[:, :, :, 1] * high).sum(-2)
        rows.append((y * step + own.sum((3, 4)) * offset.float()[:, :, :, 0]).sum(2))
    return torch.stack(rows, dim=2)


def _step(scale: Tensor) -> Tensor:
    return ((scale.float() - SCALE_ZERO) / OCTAVE).exp2()

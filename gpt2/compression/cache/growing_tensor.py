"""A tensor that grows without being copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALLEST_CHUNK = 64  # tokens; together with GROWTH, less than 5 % is unused from 2,048 tokens on
GROWTH = 32
MERGED = 4  # a chunk made by merging holds at most 1/MERGED of all entries, so that the largest are never copied


class GrowingTensor:
    """A tensor [B, G, n, …] that grows along its third dimension, stored in chunks of the widest dtype appended.

    A new chunk has room for what is appended, for at least `smallest` entries and at least 1/GROWTH of what is held.
    Full chunks of equal size are merged, like digits that carry in a binary counter. So there are O(log n) chunks,
    which bounds what readers pay for them, and each entry is copied O(log n) times at most.

    kept: what readers have made of `views`, by names of theirs, until these change. Decode steps change them once in a
    block, and every other step would make the same again.

    placed: what readers have made of where the chunks lie, until that changes: while what is appended fits into the
    room of the last chunk, it stays. Another dict takes its place then.
    """

    def __init__(self, smallest: int = SMALLEST_CHUNK):
        self.smallest = smallest
        self.chunks = []
        self.length = 0
        self.unused = 0  # entries at the end of the last chunk
        self.shared = False  # whether forks may hold the same chunks, so that none is written to that is given back

    @property
    def chunks(self) -> list[Tensor]:
        """All chunks, the last one with its unused room. Whoever changes the list in place calls `_change` first."""
        return self._chunks

    @chunks.setter
    def chunks(self, chunks: list[Tensor]) -> None:
        self._change()
        self._chunks = chunks

    def _change(self) -> None:
        """Forget what was made of the chunks, which are about to change: it would also keep their memory."""
        self._lengthen()
        self.placed: dict[str, Any] = {}

    def _lengthen(self) -> None:
        """Forget what was made of the chunks as far as they were used."""
        self._views: list[Tensor] | None = None
        self.kept: dict[str, Any] = {}

    def __getstate__(self) -> dict:
        # Views would be copied and pickled beside their chunks, as tensors of their own
        return self.__dict__ | {"_views": None, "kept": {}, "placed": {}}

    def append(self, x: Tensor) -> None:
        self._lengthen()
        if self.chunks and x.dtype.itemsize > self.chunks[0].dtype.itemsize:
            self.map_(lambda chunk: chunk.to(x.dtype))
        while x.shape[2]:
            if not self.unused:
                self._change()
                self._merge()
                self.unused = max(x.shape[2], self.smallest, self.length // GROWTH)
                with torch.inference_mode(False):  # else later appends outside inference mode couldn't write to it
                    dtype = self.chunks[0].dtype if self.chunks else x.dtype
                    self.chunks.append(x.new_empty((*x.shape[:2], self.unused, *x.shape[3:]), dtype=dtype))
            last, taken = self.chunks[-1], x[:, :, : self.unused]
            start = last.shape[2] - self.unused
            last[:, :, start : start + taken.shape[2]] = taken
            x = x[:, :, self.unused :]
            self.unused -= taken.shape[2]
            self.length += taken.shape[2]

    def _merge(self) -> None:
        """Merge neighbours, all of them full, where the older one isn't larger than the newer."""
        i = 0
        while i + 1 < len(self.chunks):
            older, newer = (chunk.shape[2] for chunk in self.chunks[i : i + 2])
            if older > newer or MERGED * (older + newer) > self.length:
                i += 1
                continue
            with torch.inference_mode(False):
                self.chunks[i : i + 2] = [torch.cat(self.chunks[i : i + 2], dim=2)]
            i = max(i - 1, 0)

    def views(self) -> list[Tensor]:
        """The used part of each chunk, without a copy. The list isn't the caller's to change."""
        if self._views is None:
            ends = (last[:, :, : last.shape[2] - self.unused] for last in self.chunks[-1:])
            self._views = [*self.chunks[:-1], *ends]
        return self._views

    def last(self, entries: int) -> Tensor:
        """The last `entries`, or as many as there are."""
        return self.between(max(self.length - entries, 0), self.length)

    def between(self, first: int, end: int) -> Tensor:
        """Entries number `first` to `end`, a copy only where they are of several chunks."""
        parts, start = [], 0
        for view in self.views():
            stop = start + view.shape[2]
            if max(first, start) < min(end, stop):
                parts.append(view[:, :, max(first - start, 0) : end - start])
            start = stop
        return parts[0] if len(parts) == 1 else torch.cat(parts or [self.views()[0][:, :, :0]], dim=2)

    def fork(self) -> GrowingTensor:
        """A tensor that holds the same chunks without copying them. Each appends to chunks of its own from then on."""
        self._seal()
        self.shared = True
        other = GrowingTensor(self.smallest)
        other.chunks, other.length, other.shared = list(self.chunks), self.length, True
        return other

    def _seal(self) -> None:
        """Leave the unused room of the last chunk to nobody."""
        self.chunks, self.unused = list(self.views()), 0

    def truncate(self, length: int) -> None:
        """Remove all entries from `length` on."""
        self._change()
        drop, self.length = self.length - length, length
        while drop:
            used = self.chunks[-1].shape[2] - self.unused
            if drop < used:
                self.unused += drop
                if self.shared:
                    self._seal()
                return
            self.chunks.pop()
            drop, self.unused = drop - used, 0

    def drop_front(self, entries: int) -> None:
        """Remove the first `entries`. What is left of a chunk that is cut is copied, so that its memory is freed."""
        self._change()
        self.length -= entries
        while entries:
            last = len(self.chunks) == 1
            used = self.chunks[0].shape[2] - (self.unused if last else 0)
            if entries < used:
                with torch.inference_mode(False):  # as in `append`
                    self.chunks[0] = self.chunks[0][:, :, entries:].clone(memory_format=torch.contiguous_format)
                return
            self.chunks.pop(0)
            entries, self.unused = entries - used, 0 if last else self.unused

    def map_(self, fn: Callable[[Tensor], Tensor]) -> None:
        with torch.inference_mode(False):  # as in `append`
            self.chunks = [fn(chunk) for chunk in self.chunks]

"""Left padding: how much of it each row of a batch has, and each row's own attention sinks.

Rows of different lengths are padded on the left, so a row's first token isn't in the cache's first slot. Codecs that
know positions must count from the row's first token, and the tokens to keep exact as sinks are the row's first ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# Largest difference of padding's keys, relative to the largest number: rows of a product may round differently
ALIKE = 2**-6


class PaddingFinder:
    """Finds the padding of each row from the first layer's keys, [B] in `rows`; None where there is none.

    All padding has one token at one position, so in the model's first layer its keys are the same, and text never
    begins so: keys of the same token at two positions differ by their rotation. Where a model is given no position_ids,
    padding has positions of its own, and slots are positions.
    """

    def __init__(self):
        self.rows: Tensor | None = None
        self.changing = False  # whether the newest keys could tell
        self._runs: Tensor | None = None  # [B], slots at the beginning of each row that are as its first
        self._open: Tensor | None = None  # [B], rows that were so to their end
        self._first: Tensor | None = None  # [B, H, 1, d], keys of the first slot

    def see(self, keys: Tensor) -> None:
        """Take in the first layer's new keys [B, H, n, d], from the first call on."""
        begins = self._first is None
        self.changing = (begins or bool(self._open.any())) and not isinstance(keys, FakeTensor)
        if not self.changing:
            return
        if begins:
            self._first, self._open = keys[:, :, :1].detach().clone(), torch.ones(len(keys), dtype=torch.bool)
            self._runs = torch.zeros(len(keys), dtype=torch.long)
        elif len(self._first) != len(keys):  # rows were selected before all of them had a token that tells
            self._open = torch.zeros(len(keys), dtype=torch.bool)
            return
        near = (keys.detach() - self._first).abs().amax((1, 3)) <= ALIKE * self._first.abs().amax((1, 2, 3))[:, None]
        run = near.long().cumprod(1).sum(1).cpu()
        self._runs += run * self._open
        self._open &= run == keys.shape[2]
        padding = torch.where((self._runs >= 2) | self._like_padding(), self._runs, 0)
        self.rows = padding if padding.any() else None

    def _like_padding(self) -> Tensor:
        """Rows whose first slot is as that of a row with padding, [B]."""
        padded = int(self._runs.argmax())
        if self._runs[padded] < 2:
            return torch.zeros_like(self._open)
        reference = self._first[padded]
        near = (self._first - reference).abs().amax((1, 2, 3)) <= ALIKE * reference.abs().amax()
        return near.cpu()


class OwnSinks:
    """The first tokens of each padded row, exact: K or V of one layer, laid over what blocks read in their slots."""

    def __init__(self, count: int):
        self.count = count
        self.padding: Tensor | None = None  # [B] slots
        self.tokens: Tensor | None = None  # [B, H, count, d]
        self.kept: Tensor | None = None  # [B, count], those that were seen
        self.complete = False
        self._end = 0  # slot behind the last
        self._found: tuple | None = None  # what `_present` found last

    def __bool__(self) -> bool:
        return self.kept is not None

    def see(self, x: Tensor, start: int) -> None:
        """Keep what belongs to sinks of new tokens x [B, H, n, d], of which the first is in slot `start`."""
        if self.padding is None or not self.count or self.complete:
            return
        if self.tokens is None:
            self.tokens = x.new_zeros((*x.shape[:2], self.count, x.shape[3]))
            self.kept = torch.zeros(len(x), self.count, dtype=torch.bool, device=x.device)
        place = self._slots() - start  # [B, count]
        rows, slots = ((place >= 0) & (place < x.shape[2])).nonzero(as_tuple=True)
        self.tokens[rows, :, slots] = x[rows, :, place[rows, slots]].to(self.tokens.dtype)
        self.kept[rows, slots] = True
        self.complete, self._found, self._end = bool(self.kept.all()), None, int(self.padding.max()) + self.count

    def without_padding(self, x: Tensor, start: int) -> Tensor:
        """Tokens x [B, H, n, d] with copies of each row's next token in place of padding and sinks.

        Both would widen the scales of blocks; attention's mask hides the one, and the others are kept exact. start:
        slot of the first.
        """
        first = self.padding + self.count
        if start >= int(first.max()):
            return x
        slot = torch.arange(start, start + x.shape[2], device=x.device)
        place = (slot.maximum(first[:, None]) - start).clamp_max(x.shape[2] - 1)
        return self._gather(x, place)

    def over(self, x: Tensor, start: int) -> Tensor:
        """Tokens x [B, H, n, d] with the sinks in their places; the first is in slot `start`."""
        x = x.clone()
        for rows, slots, places in self._present(start, x.shape[2]):
            x[rows, :, places] = self.tokens[rows, :, slots].to(x.dtype)
        return x

    def scores(self, q: Tensor, out: Tensor, start: int) -> None:
        """Write q · k of the sinks over scores out [B, H, M, n], whose first column is slot `start`; q [B, H, M, d]."""
        own = (q @ self.tokens.to(q.dtype).mT).to(out.dtype)
        for rows, slots, places in self._present(start, out.shape[3]):
            out[rows, :, :, places] = own[rows, :, :, slots]

    def take(self, p: Tensor, start: int) -> Tensor:
        """Σ p v over the sinks, [B, H, M, d] float32, whose weights are then 0 in p [B, H, M, n]."""
        own = p.new_zeros((*p.shape[:3], self.count))
        for rows, slots, places in self._present(start, p.shape[3]):
            own[rows, :, :, slots] = p[rows, :, :, places]
            p[rows, :, :, places] = 0
        return (own.to(self.tokens.dtype) @ self.tokens).float()

    def map_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every stored tensor, as TokenStore does."""
        for name in ("padding", "tokens", "kept"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else fn(value))
        self._found = None

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tokens, self.kept, self.padding) if tensor is not None)

    def _slots(self) -> Tensor:
        return self.padding[:, None] + torch.arange(self.count, device=self.padding.device)

    @staticmethod
    def _gather(x: Tensor, place: Tensor) -> Tensor:
        """Tokens of x [B, H, n, d] at `place` [B, m] of each row, [B, H, m, d]."""
        return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def _present(self, start: int, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows, numbers and places of the sinks among `length` tokens from slot `start` on, [sinks] each."""
        if self._found is None or self._found[0] != (start, min(length, self._end)):
            place = self._slots() - start
            rows, slots = (self.kept & (place >= 0) & (place < length)).nonzero(as_tuple=True)
            self._found = (start, min(length, self._end)), [(rows, slots, place[rows, slots])] if len(rows) else []
        return self._found[1]

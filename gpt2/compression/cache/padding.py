"""Left padding: how much of it each row of a batch has, and each row's own attention sinks.

Rows of different lengths are padded on the left, so a row's first token isn't in the cache's first slot. Codecs that
know positions must count from the row's first token, and the tokens to keep exact as sinks are the row's first ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# Largest difference of padding's keys and values, relative to their size: rows of a product may round differently
ALIKE = 2**-6
ALL = slice(None)


class PaddingFinder:
    """Finds the padding of each row from the first layer's K and V, [B] in `rows`; None where there is none.

    All padding has one token at one position, so in the model's first layer its K and V are the same, and text hardly
    begins so: keys of the same token at two positions differ by their rotation. Where a model is given no position_ids,
    padding has positions of its own, and slots are positions. Two beginnings of texts count as padding, which OwnSinks
    reads as they are nevertheless: a token that also pads, as transformers gives padding the first token's position,
    and one token several times where keys have no positions (ALiBi).
    """

    def __init__(self):
        self.rows: Tensor | None = None
        self.open: Tensor | None = None  # [B], rows that were padding to their end so far
        self.first: tuple[Tensor, ...] | None = None  # [B, H, 1, d] each, K and V of the first slot
        self.changing = False  # whether the newest keys could tell
        self._before = None, None, None  # rows, open and first without them

    def see(self, *states: Tensor) -> None:
        """Take in the first layer's new K and V [B, H, n, d], from the first call on."""
        usual = states[0].shape[2] > 0 and not isinstance(states[0], FakeTensor)
        self.changing = usual and (self.open is None or bool(self.open.any()))
        if not self.changing:
            return
        self._before = self.rows, self.open, self.first  # none of which is changed in place once `see` is through
        states, count = tuple(x.detach() for x in states), len(states[0])
        if self.first is None:
            self.first = tuple(x[:, :, :1].clone() for x in states)
            self.open = torch.ones(count, dtype=torch.bool, device="cpu")
            self.rows = torch.zeros(count, dtype=torch.long, device="cpu")
        run = _same(states, self.first).long().cumprod(1).sum(1).cpu()
        self.rows = self.rows + run * self.open
        self.open = self.open & (run == states[0].shape[2])
        self.rows[~self.open & (self.rows < 2) & ~self._like_padding()] = 0  # one slot that is like itself
        if not self.open.any() and not self.rows.any():
            self.rows = None

    def unsee(self) -> None:
        """Forget what the latest `see` took in: its keys were rejected."""
        if self.changing:
            self.rows, self.open, self.first = self._before

    @property
    def found(self) -> Tensor | None:
        """`rows` without a first slot that is only like itself."""
        if self.rows is None or not bool((self.rows >= 2).any()):
            return None
        return torch.where((self.rows >= 2) | self._like_padding(), self.rows, 0)

    def crop(self, length: int) -> None:
        """Forget all slots but the first `length`: what comes next may be more padding, or begin a row."""
        if length == 0:
            self.__init__()
        elif self.rows is not None and self.open is not None:
            self.open = self.open | (self.rows >= length)
            self.rows = self.rows.clamp_max(length)

    def map_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to what is known of the rows: batch selection."""
        self.rows, self.open = (x if x is None else fn(x) for x in (self.rows, self.open))
        self.first = self.first and tuple(fn(x) for x in self.first)

    def _like_padding(self) -> Tensor:
        """Rows whose first slot is as that of a row with padding, [B]."""
        padded = (self.rows >= 2).nonzero()[:1]
        if not len(padded):
            return torch.zeros_like(self.open)
        return _same(self.first, tuple(x[padded[0].to(x.device)] for x in self.first))[:, 0].cpu()


def _same(states: tuple[Tensor, ...], first: tuple[Tensor, ...]) -> Tensor:
    """Which slots of K and V [B, H, n, d] each are as the first [B, H, 1, d] in every channel, [B, n].

    Not by the largest number: in keys of Qwen2.5, a bias makes one channel larger than all that tells tokens apart.
    """
    same = []
    for x, reference in zip(states, first, strict=True):
        size = reference.abs()
        ordered = size.flatten(1).sort(1).values  # a median isn't deterministic on a GPU, and may be forbidden there
        usual = ordered[:, (ordered.shape[1] - 1) // 2, None, None, None]
        same.append(((x - reference).abs() <= ALIKE * size.maximum(usual)).all(3).all(1))
    return torch.stack(same).all(0)


class OwnSinks:
    """The first tokens of each padded row, exact: K or V of one layer, laid over what blocks read in their slots.

    So is the padding in the block in which the row's text begins, where copies of that text are stored in its place,
    and the last slot of padding in any case. Padding is one token, and so is what may be taken for it: all have K and V
    of this last slot. In deeper layers a text's first token has others than padding before it.

    block: tokens of a block of the codec; 0 where the codec is exact, so that nothing is kept.
    """

    def __init__(self, count: int, block: int):
        self.count, self.block = count, block
        self.padding: Tensor | None = None  # [B] slots
        self.forget()

    def forget(self) -> None:
        """Forget all tokens."""
        self.tokens: Tensor | None = None  # [B, H, count + 1, d], the last of which is padding's last slot
        self.kept: Tensor | None = None  # [B, count], those that were seen
        self.complete = False
        self.end = 0  # slot behind the last
        self._found: tuple | None = None  # what `_present` found last
        self._apart: tuple | None = None  # what `apart` made of that
        self._most: int | None = None  # largest padding

    def _changed(self) -> None:
        """Drop what was found of tokens and padding as they were."""
        self._found = self._apart = self._most = None

    def _most_padding(self) -> int:
        """The largest padding; asked of a GPU once."""
        if self._most is None:
            self._most = int(self.padding.max())
        return self._most

    def __bool__(self) -> bool:
        return self.kept is not None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_found": None, "_apart": None}  # views of one tensor would become tensors of their own

    def set_padding(self, padding: Tensor | None) -> None:
        """Padding of each row in slots; None where there turned out to be none."""
        self.padding, self.complete = padding if self.block else None, False
        self._changed()
        if padding is None:
            self.forget()

    def see(self, x: Tensor, start: int) -> None:
        """Keep what belongs to sinks of new tokens x [B, H, n, d], of which the first is in slot `start`."""
        if self.padding is None or not self.block or self.complete or not x.shape[2]:
            return
        if self.tokens is None:
            self.tokens = x.new_zeros((*x.shape[:2], self.count + 1, x.shape[3]))
            self.tokens[:, :, -1:] = x[:, :, :1]  # of rows whose padding wasn't known when it came
            self.kept = torch.zeros(len(x), self.count, dtype=torch.bool, device=x.device)
        if self.tokens.is_inference() and not torch.is_inference_mode_enabled():  # may be read there only
            self.tokens, self.kept = self.tokens.clone(), self.kept.clone()
        place = torch.cat((self._slots(), self.padding[:, None] - 1), dim=1) - start  # [B, count + 1]
        new = (place >= 0) & (place < x.shape[2])
        rows, slots = new.nonzero(as_tuple=True)
        self.tokens[rows, :, slots] = x[rows, :, place[rows, slots]].to(self.tokens.dtype)
        self.kept = self.kept | new[:, :-1]
        self._changed()
        self.end = self._most_padding() + self.count
        self.complete = bool(self.kept.all()) and self.end <= start + x.shape[2]

    def crop(self, length: int) -> None:
        """Forget all slots but the first `length`: other tokens may come in their place."""
        if self.padding is None:
            return
        if length == 0:
            self.set_padding(None)
            return
        if self.kept is not None:
            self.kept = self.kept & (self._slots() < length)
        self.padding, self.complete = self.padding.clamp_max(length), False
        self._changed()
        self.end = min(self.end, length + self.count)

    def without_padding(self, x: Tensor, start: int) -> Tensor:
        """Tokens x [B, H, n, d] with copies of each row's next token in place of padding, which would widen scales.

        start: slot of the first. Only in blocks that have text too: others are stored as they are.
        """
        if start >= self._most_padding():
            return x
        slot = torch.arange(start, start + x.shape[2], device=x.device)
        shared = slot >= self._text_block()[:, None]
        place = torch.where(shared, slot.maximum(self.padding[:, None]), slot) - start
        return self._gather(x, place.clamp_max(x.shape[2] - 1))

    def _text_block(self) -> Tensor:
        """First slot of the block in which each row's text begins, [B]."""
        return self.padding // self.block * self.block

    def over(self, x: Tensor, start: int) -> Tensor:
        """Tokens x [B, H, n, d] with the sinks in their places; the first is in slot `start`."""
        x = x.clone()
        for rows, slots, places in self._present(start, x.shape[2]):
            x[rows, :, places] = self.tokens[rows, :, slots].to(x.dtype)
        return x

    def scores(self, q: Tensor, out: Tensor, start: int, heads: slice = ALL) -> None:
        """Write q · k of the sinks over scores out [B, H, M, n], whose first column is slot `start`; q [B, H, M, d].

        heads: which of those held are K's, H of them.
        """
        own = (q @ self.tokens[:, heads].to(q.dtype).mT).to(out.dtype)
        for rows, slots, places in self._present(start, out.shape[3]):
            out[rows, :, :, places] = own[rows, :, :, slots]

    def take(self, p: Tensor, start: int, heads: slice = ALL) -> Tensor:
        """Σ p v over the sinks, [B, H, M, d] float32, whose weights are then 0 in p [B, H, M, n].

        heads: which of those held are V's, H of them.
        """
        own = p.new_zeros((*p.shape[:3], self.count + 1))
        for rows, slots, places in self._present(start, p.shape[3]):
            own.permute(0, 3, 1, 2).index_put_((rows, slots), p[rows, :, :, places], accumulate=True)
            p[rows, :, :, places] = 0
        return (own.to(self.tokens.dtype) @ self.tokens[:, heads]).float()

    def apart(self, start: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is laid over `length` tokens from slot `start` on, as tokens of their own, [B, n] each.

        Their numbers in `tokens`, their places, and which there are: rows have different numbers of them.
        """
        present = self._present(start, length)  # which replaces `_found` where something has changed
        if self._apart is None or self._apart[0] is not present:
            self._apart = present, self._by_row(present)
        return self._apart[1]

    def _by_row(self, present: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """As `apart`, of what `_present` gave."""
        nothing = torch.zeros(3, 0, dtype=torch.long, device=self.kept.device)
        rows, slots, places = (torch.cat(parts) for parts in zip(nothing, *present, strict=True))
        order = rows.argsort(stable=True)
        rows, slots, places = rows[order], slots[order], places[order]
        counts = rows.bincount(minlength=len(self.padding))
        column = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        found = slots.new_zeros(3, len(counts), int(counts.max()))
        for own, values in zip(found, (slots, places, torch.ones_like(rows)), strict=True):
            own[rows, column] = values
        return found[0], found[1], found[2].bool()

    def map_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every stored tensor, as TokenStore does."""
        for name in ("padding", "tokens", "kept"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else fn(value))
        self._changed()

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        found = [tensor for each in (self._found[1] if self._found else ()) for tensor in each]
        found += self._apart[1] if self._apart else ()
        return [x for x in (self.tokens, self.kept, self.padding, *found) if x is not None]

    def _slots(self) -> Tensor:
        return self.padding[:, None] + torch.arange(self.count, device=self.padding.device)

    @staticmethod
    def _gather(x: Tensor, place: Tensor) -> Tensor:
        """Tokens of x [B, H, n, d] at `place` [B, m] of each row, [B, H, m, d]."""
        return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def _present(self, start: int, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows, numbers in `tokens` and places of what is laid over `length` tokens from slot `start` on."""
        end = min(length, self.end)
        if self._found is None or self._found[0] != (start, end):
            place = self._slots() - start
            rows, slots = (self.kept & (place >= 0) & (place < length)).nonzero(as_tuple=True)
            places = place[rows, slots]
            slot = torch.arange(start, start + end, device=place.device)
            first = self._text_block().minimum(self.padding - 1)[:, None]
            padded, at = ((slot >= first) & (slot < self.padding[:, None])).nonzero(as_tuple=True)
            found = [(rows, slots, places), (padded, torch.full_like(padded, self.count), at)]
            self._found = (start, end), [each for each in found if len(each[0])]
        return self._found[1]

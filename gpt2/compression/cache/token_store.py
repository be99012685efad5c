"""Where cached tokens live: tensors that grow without copying all they hold, and one side of one layer made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import Compressor
from gpt2.compression.codecs.base import Encoded
from gpt2.compression.kernels import dispatch

SMALLEST_PIECE = 64  # tokens; with 1/32 of what is held already, under 5 % is unused from 2k tokens on
GROWTH = 32
MERGED = 4  # a merged piece holds at most one in so many of all entries: the largest are never copied


def precisely(x: Tensor) -> AbstractContextManager:
    """Out of autocast where x lies, if it is on: a codec works in its own dtype, whatever the model works in."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


class Pieces:
    """A tensor [B, G, n, …] that grows along its third dimension, in pieces.

    A new piece has room for what is being appended, at least `smallest` entries and at least 1/32 of what is held, so
    unused room stays small. Full pieces are merged with their equals, as in a binary counter: there are O(log n) of
    them, which readers pay for, and an entry is copied O(log n) times at most.
    """

    def __init__(self, smallest: int = SMALLEST_PIECE):
        self.smallest = smallest
        self.parts: list[Tensor] = []
        self.length = 0
        self.room = 0  # unused entries at the end of the last part

    def append(self, x: Tensor) -> None:
        while x.shape[2]:
            if not self.room:
                self._merge()
                self.room = max(x.shape[2], self.smallest, self.length // GROWTH)
                with torch.inference_mode(False):  # a piece made in inference mode couldn't be written outside it
                    self.parts.append(x.new_empty((*x.shape[:2], self.room, *x.shape[3:])))
            last, taken = self.parts[-1], x[:, :, : self.room]
            start = last.shape[2] - self.room
            last[:, :, start : start + taken.shape[2]] = taken
            x = x[:, :, self.room :]
            self.room -= taken.shape[2]
            self.length += taken.shape[2]

    def _merge(self) -> None:
        """Join neighbours, all of them full, of which the older isn't the larger one."""
        i = 0
        while i + 1 < len(self.parts):
            older, newer = (part.shape[2] for part in self.parts[i : i + 2])
            if older > newer or MERGED * (older + newer) > self.length:
                i += 1
                continue
            with torch.inference_mode(False):
                self.parts[i : i + 2] = [torch.cat(self.parts[i : i + 2], dim=2)]
            i = max(i - 1, 0)

    def views(self) -> list[Tensor]:
        """What is held, piece by piece, without a copy."""
        return [*self.parts[:-1], *(last[:, :, : last.shape[2] - self.room] for last in self.parts[-1:])]

    def truncate(self, length: int) -> None:
        """Forget all entries from `length` on."""
        drop, self.length = self.length - length, length
        while drop:
            used = self.parts[-1].shape[2] - self.room
            if drop < used:
                self.room += drop
                return
            self.parts.pop()
            drop, self.room = drop - used, 0

    def map_(self, fn: Callable[[Tensor], Tensor]) -> None:
        with torch.inference_mode(False):  # as in append: what is written to later can't be an inference tensor
            self.parts = [fn(part) for part in self.parts]


class TokenStore:
    """K or V of one layer, [B, H, T, d] seen from outside: exact sinks | compressed blocks | exact tail.

    Blocks begin at multiples of the codec's `block_tokens`: sinks that don't fill one leave the first with a lead of
    copies in their place, and a prompt that ends with a block leaves no tail. The tail has less than one block plus
    `recent_tokens`. What `read` returns is always what is stored: the reconstruction of the blocks, also of tokens
    that were appended a moment ago.

    keep_expanded: hold the reconstruction beside the blocks, so that each block is expanded once. It takes the memory
    that compression saves and is counted: for evaluations that read the whole history at every step. An exact codec
    holds what it reconstructs already.
    """

    def __init__(self, compressor: Compressor, sink_tokens: int, recent_tokens: int):
        self.compressor = compressor
        # An exact codec needs no exact sinks or tail beside it
        self.sink_tokens = 0 if compressor.exact else sink_tokens
        self.recent_tokens = 0 if compressor.exact else recent_tokens
        self.lead = self.sink_tokens % compressor.block_tokens
        self.keep_expanded = False
        self.clear()

    def clear(self) -> None:
        self.sinks: Tensor | None = None
        self.tail: Tensor | None = None
        self.blocks: dict[str, Pieces] = {}
        self.expanded: Tensor | None = None

    def prepare(self, x: Tensor, where: str) -> None:
        """Take device, dtype and shape from the first tokens x [B, H, T, d]."""
        self.compressor.check_shape(x.shape[1], x.shape[3], where)
        self.compressor = self.compressor.to(x.device)
        self.sinks = self.tail = x.new_empty((*x.shape[:2], 0, x.shape[3]))

    @property
    def compressed_blocks(self) -> int:
        return next((pieces.length for pieces in self.blocks.values()), 0)

    @property
    def compressed_tokens(self) -> int:
        return max(self.compressed_blocks * self.compressor.block_tokens - self.lead, 0)

    def __len__(self) -> int:
        return 0 if self.sinks is None else self.sinks.shape[2] + self.compressed_tokens + self.tail.shape[2]

    def append(self, x: Tensor) -> None:
        """Add tokens x [B, H, n, d]; blocks that become full are compressed, nothing that is stored is touched.

        Where they come in another dtype, as when autocast is switched, all are held in the wider: `torch.cat`'s rule.
        """
        if x.dtype != self.sinks.dtype:
            self._widen(torch.promote_types(x.dtype, self.sinks.dtype))
            x = x.to(self.sinks.dtype)
        missing = self.sink_tokens - self.sinks.shape[2]
        if missing > 0:
            self.sinks = torch.cat((self.sinks, x[:, :, :missing]), dim=2)
            x = x[:, :, missing:]
        waiting = torch.cat((self.tail, x), dim=2) if self.tail.shape[2] else x
        block = self.compressor.block_tokens
        lead = 0 if self.compressed_blocks else self.lead
        full = max(lead + waiting.shape[2] - self.recent_tokens, 0) // block * block - lead
        if full > 0:
            self.compress(waiting[:, :, :full], lead)
            waiting = waiting[:, :, full:]
            # A copy: a slice would keep the whole prompt's activations alive
            waiting = waiting.clone(memory_format=torch.contiguous_format)
        self.tail = waiting.clone(memory_format=torch.contiguous_format) if waiting is x else waiting

    def _widen(self, dtype: torch.dtype) -> None:
        self.sinks, self.tail = self.sinks.to(dtype), self.tail.to(dtype)
        self.expanded = None if self.expanded is None else self.expanded.to(dtype)
        if self.compressor.quantizer.lossless:  # codes have dtypes of their own
            for pieces in self.blocks.values():
                pieces.map_(lambda t: t.to(dtype))

    def compress(self, x: Tensor, lead: int) -> None:
        """Store whole blocks: `lead` places that sinks have left, and tokens x [B, H, n, d]."""
        if lead:
            x = torch.cat((x[:, :, :1].expand(-1, -1, lead, -1), x), dim=2)
        block = self.compressor.block_tokens
        fields = dispatch.compress(self.compressor, x, self._position(self.compressed_blocks))
        for name, field in fields.items():
            self.blocks.setdefault(name, Pieces(max(SMALLEST_PIECE // block, 1))).append(field)

    def _position(self, block: int) -> int:
        """Position in the sequence of a block's first place."""
        return self.sink_tokens - self.lead + block * self.compressor.block_tokens

    def read(self) -> Tensor:
        """All tokens, [B, H, T, d]."""
        parts = [part for part in (self.sinks, self._expand(), self.tail) if part is not None and part.shape[2]]
        if not parts:
            return self.sinks
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def pieces(self) -> Iterator[tuple[int, Encoded]]:
        """Blocks as they are stored, without a copy: position of the first place, and fields, piece by piece.

        Of the first block the lead lies at the positions of the last sinks.
        """
        position = self._position(0)
        for views in zip(*(pieces.views() for pieces in self.blocks.values()), strict=True):
            if blocks := views[0].shape[2]:
                yield position, dict(zip(self.blocks, views, strict=True))
                position += blocks * self.compressor.block_tokens

    def holds(self, x: Tensor) -> bool:
        """Whether x [B, H, T, d] are the tokens held: stored in the same way, they read the same."""
        again = TokenStore(self.compressor, self.sink_tokens, self.recent_tokens)
        x = x.to(self.sinks.dtype)
        again.prepare(x, "comparison")
        again.append(x)
        # Not to the bit: another number of rows rounds differently in a matmul, and may tip a code over
        close = torch.isclose(again.read(), self.read(), rtol=1e-3, atol=1e-6)
        return bool((close.float().mean(dim=(1, 2, 3)) > 0.9).all())

    def _expand(self, start_block: int = 0) -> Tensor | None:
        """Reconstruction of the blocks from `start_block` on."""
        if not self.compressed_tokens:
            return None
        if self.keep_expanded and not self.compressor.exact:
            return self._kept(start_block)
        x = self._expand_from(start_block)
        return x if start_block else x[:, :, self.lead :]

    def _kept(self, start_block: int) -> Tensor:
        """As `_expand`, from the reconstruction that is held, to which new blocks are added first."""
        block = self.compressor.block_tokens
        known = 0 if self.expanded is None else self.expanded.shape[2] // block
        if known < self.compressed_blocks:
            new = self._expand_from(known)
            self.expanded = new if self.expanded is None else torch.cat((self.expanded, new), dim=2)
        return self.expanded[:, :, start_block * block or self.lead :]

    def _expand_from(self, start_block: int) -> Tensor:
        """Reconstruction of whole blocks, the lead included."""
        fields = {name: _joined(pieces.views())[:, :, start_block:] for name, pieces in self.blocks.items()}
        return self.reconstruct(fields, start_block)

    def reconstruct(self, fields: Encoded, start_block: int) -> Tensor:
        """Tokens [B, H, n · block, d] of n blocks as they are stored; `start_block` is the place of the first one."""
        return self.compressor.reconstruct(fields, self.sinks.shape[3], self.sinks.dtype, self._position(start_block))

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens. What stays of a block that is cut joins the tail as its reconstruction."""
        length = len(self) - tokens
        if length < 0:
            raise PluginError(f"can't crop {tokens} tokens from a cache of {len(self)}")
        in_tail = length - self.sinks.shape[2] - self.compressed_tokens
        if in_tail >= 0:
            self.tail = self.tail[:, :, :in_tail].clone()
            return
        behind_sinks = max(length - self.sinks.shape[2], 0)
        blocks, rest = divmod(behind_sinks + self.lead, self.compressor.block_tokens) if behind_sinks else (0, 0)
        rest = min(rest, behind_sinks)  # in the first block the lead is no token
        self.tail = self._expand(blocks)[:, :, :rest].contiguous().clone() if rest else self.tail[:, :, :0].clone()
        for pieces in self.blocks.values():
            pieces.truncate(blocks)
        if self.expanded is not None:
            self.expanded = self.expanded[:, :, : blocks * self.compressor.block_tokens].clone() if blocks else None
        self.sinks = self.sinks[:, :, :length].clone()

    def nbytes(self) -> int:
        """Bytes held: sinks, codes with their metadata, tail, and room in the pieces that isn't used yet."""
        pieces = [part for pieces in self.blocks.values() for part in pieces.parts]
        return sum(t.nbytes for t in (self.sinks, self.tail, self.expanded, *pieces) if t is not None)

    def map_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every stored tensor: batch selection, or a move between devices."""
        if self.sinks is None:
            return
        self.sinks, self.tail = fn(self.sinks), fn(self.tail)
        self.expanded = None if self.expanded is None else fn(self.expanded)
        for pieces in self.blocks.values():
            pieces.map_(fn)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

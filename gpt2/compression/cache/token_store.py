"""Storage of cached tokens: K or V of a layer, or both together."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from gpt2.common.errors import PluginError
from gpt2.compression.cache.growing_tensor import SMALLEST_CHUNK, GrowingTensor
from gpt2.compression.cache.padding import OwnSinks
from gpt2.compression.cache.storages import storages_of
from gpt2.compression.codecs import Compressor, IdentityCompressor
from gpt2.compression.codecs.base import HALF_MAX, Encoded, waits
from gpt2.compression.codecs.formats import Format
from gpt2.compression.kernels import dispatch

log = logging.getLogger(__name__)
# Tokens that a store forgets together where its blocks are smaller: what is left of a chunk is copied
DROPPED = 64
# Error of codes against the spread of tokens up to which tokens count as the same: other tokens have about 2
SAME_SHARE = 0.3
# Of that spread, what channels may have whose error exceeds it: codecs lose channels that hardly vary
MOVED_SHARE = 0.05
SHORTEST_REACH = 2 * DROPPED - 1  # of windows that are compressed


_has_autocast = functools.cache(torch.amp.is_autocast_available)  # asked in every layer at every step


def in_autocast(x: Tensor) -> bool:
    """Whether autocast is on, on the device of x."""
    device = x.device.type
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the device of x: codecs compute in their own dtype, not in the model's."""
    return torch.autocast(x.device.type, enabled=False) if in_autocast(x) else nullcontext()


class TokenStore:
    """K or V of one layer, in order: exact sinks, compressed blocks, an exact tail. Readers see [B, H, T, d].

    Blocks begin at positions that are multiples of the codec's `block_tokens`, so that a prompt that ends with a block
    leaves no tail. Where the number of sinks isn't such a multiple, the first block begins at the position of a sink:
    it starts with `lead` padding slots, copies of its first token, in place of those sinks. The tail has fewer tokens
    than a block, plus `recent_tokens`. `read` returns what is stored, also for tokens that were just appended: of
    blocks, their reconstruction.

    reach: number of latest tokens that later queries see, in layers with a sliding window; None: all. The layer drops
    what is out of reach, whole blocks at a time, sinks with the first. A window hardly longer than a block of 64
    tokens is stored exactly, as a tail: its unfinished block would take more than compression saves.

    keep_reconstructed: keep each block's reconstruction beside it, so that it is made once. This takes the memory that
    compression saves, and is counted: for evaluations that read the whole history at every step. A codec that is exact
    has no need of it.
    """

    heads = slice(None)  # those that it has of what it stores

    def __init__(self, compressor: Compressor, sink_tokens: int, recent_tokens: int, reach: int | None = None):
        self.tail_only = reach is not None and reach < SHORTEST_REACH
        self.compressor = IdentityCompressor() if self.tail_only else compressor
        self.reach = reach
        # With an exact codec, compressed tokens are exact too
        self.sink_tokens = 0 if self.compressor.exact else sink_tokens
        self.recent_tokens = 0 if self.compressor.exact else recent_tokens
        self.keep_reconstructed = False
        self.clear()

    @property
    def whole(self) -> TokenStore:
        """The store itself: what a `Half` of it is half of."""
        return self

    def clear(self) -> None:
        self.sinks: Tensor | None = None
        self.tail: Tensor | None = None
        self.blocks: dict[str, GrowingTensor] = {}
        self.reconstructed: Tensor | None = None  # of whole blocks, the lead included
        self.forgotten = 0  # tokens dropped from the front
        self.dropped_blocks = 0
        block = 0 if self.compressor.exact else self.compressor.block_tokens
        self.own_sinks = OwnSinks(self.sink_tokens, block)  # of rows with left padding
        self.visible: int | None = None  # latest tokens that the newest queries see; None: all that are held

    def prepare(self, x: Tensor, where: str) -> None:
        """Take device, dtype and shape from the first tokens x [B, H, T, d]. where: names the store in errors."""
        self.compressor.check_shape(x.shape[1], x.shape[3], where)
        self.where, self.warned = where, False
        if self.own_sinks.padding is not None:
            self.own_sinks.padding = self.own_sinks.padding.to(x.device)
        self.compressor = self.compressor.to(x.device)
        self.sinks = self.tail = x.new_empty((*x.shape[:2], 0, x.shape[3]))

    @property
    def memory_format(self) -> Format | None:
        """How blocks lie in memory, for kernels; None where PyTorch alone reads them, as with metadata in float32."""
        quantizer = self.compressor.quantizer
        wide = any(stored.chunks and stored.chunks[0].dtype == torch.float32 for stored in self.blocks.values())
        return None if wide and not quantizer.lossless else quantizer.memory_format

    @property
    def lead(self) -> int:
        """Padding slots at the beginning of the first block that is held."""
        return 0 if self.dropped_blocks else self.sink_tokens % self.compressor.block_tokens

    @property
    def seen(self) -> int:
        """Tokens that were appended, those that are forgotten among them."""
        return self.forgotten + len(self)

    @property
    def hidden(self) -> int:
        """Tokens at the front that are held but out of reach of the newest queries."""
        return 0 if self.visible is None else max(len(self) - self.visible, 0)

    @property
    def compressed_blocks(self) -> int:
        for stored in self.blocks.values():  # all are of one length
            return stored.length
        return 0

    @property
    def compressed_tokens(self) -> int:
        return max(self.compressed_blocks * self.compressor.block_tokens - self.lead, 0)

    def __len__(self) -> int:
        return 0 if self.sinks is None else self.sinks.shape[2] + self.compressed_tokens + self.tail.shape[2]

    def append(self, x: Tensor) -> None:
        """Append tokens x [B, H, n, d]. Blocks that become full are compressed; those stored before aren't touched.

        Tokens of another dtype, as where autocast is switched on or off, are stored in the wider of both dtypes.
        """
        if x.dtype != self.sinks.dtype:
            self._widen(torch.promote_types(x.dtype, self.sinks.dtype))
            x = x.to(self.sinks.dtype)
        if self.own_sinks.padding is not None:
            self.own_sinks.see(x, self.seen)
        missing = self.sink_tokens - self.sinks.shape[2]
        if missing > 0 and not self.dropped_blocks:
            self.sinks = torch.cat((self.sinks, x[:, :, :missing]), dim=2)
            x = x[:, :, missing:]
        waiting = torch.cat((self.tail, x), dim=2) if self.tail.shape[2] else x
        block = self.compressor.block_tokens
        lead = 0 if self.compressed_blocks else self.lead
        full = max(lead + waiting.shape[2] - self.recent_tokens, 0) // block * block - lead
        if full > 0 and not self.tail_only:
            self.compress(waiting[:, :, :full], lead)
            waiting = waiting[:, :, full:]
            # A copy, because a slice would keep the whole prompt's activations in memory
            waiting = waiting.clone(memory_format=torch.contiguous_format)
        self.tail = waiting.clone(memory_format=torch.contiguous_format) if waiting is x else waiting

    def _widen(self, dtype: torch.dtype) -> None:
        self.sinks, self.tail = self.sinks.to(dtype), self.tail.to(dtype)
        self.reconstructed = None if self.reconstructed is None else self.reconstructed.to(dtype)
        if self.compressor.quantizer.lossless:  # other quantizers' codes don't have the model's dtype
            for stored in self.blocks.values():
                stored.map_(lambda t: t.to(dtype))

    def compress(self, x: Tensor, lead: int) -> None:
        """Store whole blocks: `lead` padding slots, then tokens x [B, H, n, d]."""
        if lead:
            x = torch.cat((x[:, :, :1].expand(-1, -1, lead, -1), x), dim=2)
        block = self.compressor.block_tokens
        if self.own_sinks.padding is not None and not self.compressor.exact:
            x = self.own_sinks.without_padding(x, self._slot(self.compressed_blocks))
        quantizer, before = self.compressor.quantizer, self.compressed_blocks
        z = self.compressor.coordinates(x, self._position(before))
        if block > 1:
            self._warn_beyond(quantizer.largest, z)
        for name, field in dispatch.quantize(quantizer, z).items():
            if name not in self.blocks:
                self.blocks[name] = self.growing()
            self.blocks[name].append(field)
        if block == 1 and waits(z) and not quantizer.lossless and self.compressed_blocks // DROPPED > before // DROPPED:
            latest = {name: stored.last(DROPPED) for name, stored in self.blocks.items()}  # not a copy of all chunks
            self._warn_beyond(HALF_MAX, quantizer.dequantize(latest, z.shape[3]))  # cut off, they read as this

    def growing(self) -> GrowingTensor:
        """An empty tensor for one field of the codes."""
        return GrowingTensor(max(SMALLEST_CHUNK // self.compressor.block_tokens, 1))

    def _warn_beyond(self, largest: float, z: Tensor) -> None:
        """Say once of a store that coordinates z [B, G, n, r] may be cut off, as they reach what can be stored."""
        if self.warned or self.compressor.exact or z.dtype == torch.float16 or isinstance(z, FakeTensor):
            return
        if (found := float(z.abs().amax())) >= largest:
            self.warned = True
            log.warning(
                "%s: numbers up to %.3g, where the codec can store %.3g, and may read larger ones as that: leave this "
                "layer uncompressed", self.where, found, largest,
            )  # fmt: skip

    def _position(self, block: int) -> int | Tensor:
        """Position in the sequence of a block's first slot: with left padding of each row, [B]."""
        padding = self.own_sinks.padding
        return self._slot(block) if padding is None else self._slot(block) - padding

    def frames(self) -> tuple[int | Tensor, int]:
        """Position of the first slot in the compressed blocks, with left padding of each row, [B]; number of frames."""
        return self._position(0), self.compressed_blocks * self.compressor.block_tokens // self.compressor.frame

    def frame_starts(self, device: torch.device) -> Tensor:
        """Position of the first slot of every frame in the compressed blocks, [n], or [B, n] with left padding."""
        first, frames = self.frames()
        starts = self.compressor.frame * torch.arange(frames, device=device)
        return starts + (first[:, None].to(device) if isinstance(first, Tensor) else first)

    def _slot(self, block: int) -> int:
        """Number of a block's first slot among all that were seen."""
        size = self.compressor.block_tokens
        return self.sink_tokens - self.sink_tokens % size + (self.dropped_blocks + block) * size

    def droppable(self, tokens: int) -> int:
        """How many of the first `tokens` can be dropped: whole blocks, the sinks with the first of them."""
        if self.tail_only:
            return tokens
        sinks, size = self.sinks.shape[2], self.compressor.block_tokens
        blocks = min((tokens - sinks + self.lead) // size, self.compressed_blocks)
        dropped = sinks + blocks * size - self.lead
        if size < DROPPED:
            dropped -= (self.forgotten + dropped) % DROPPED
        return dropped if blocks > 0 and dropped > sinks else 0

    def drop_front(self, tokens: int) -> None:
        """Forget the first `tokens`, a number that `droppable` gave."""
        self.forgotten += tokens
        if self.tail_only:
            self.tail = self.tail[:, :, tokens:].clone(memory_format=torch.contiguous_format)
            return
        blocks = (tokens - self.sinks.shape[2] + self.lead) // self.compressor.block_tokens
        for stored in self.blocks.values():
            stored.drop_front(blocks)
        if self.reconstructed is not None:
            self.reconstructed = self.reconstructed[:, :, blocks * self.compressor.block_tokens :].clone()
        self.sinks = self.sinks[:, :, :0].clone()
        self.dropped_blocks += blocks

    def read(self) -> Tensor:
        """All tokens that the newest queries see, [B, H, T, d]."""
        parts = [x for x in (self.sinks, self._reconstructed_from(0), self.tail) if x is not None and x.shape[2]]
        if not parts:
            return self.sinks
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if len(parts) == 1 and torch.is_grad_enabled():  # may be kept for a backward pass, and is written to later
            x = x.clone()
        return (self.own_sinks.over(x, self.forgotten) if self.own_sinks else x)[:, :, self.hidden :]

    def chunks(self) -> Iterator[tuple[int, Encoded]]:
        """The blocks as they are stored, without a copy: of each chunk the number of its first slot, and its tensors.

        Slots are numbered as tokens held are; the lead of the first block has the numbers of the last sinks.
        """
        position = self.sinks.shape[2] - self.lead
        for views in zip(*(stored.views() for stored in self.blocks.values()), strict=True):
            if blocks := views[0].shape[2]:
                yield position, dict(zip(self.blocks, views, strict=True))
                position += blocks * self.compressor.block_tokens

    def holds(self, x: Tensor) -> bool:
        """Whether x [B, H, T, d] are the tokens seen: what is held of them reads the same when stored again."""
        again = TokenStore(self.compressor, self.sink_tokens, self.recent_tokens)
        x = x.to(self.sinks.dtype)
        again.prepare(x, "comparison")
        again.append(x)
        held = self.read()
        # Not exactly: matrix products of another number of rows round differently, which changes a code here and there
        close = torch.isclose(again.read()[:, :, -held.shape[2] :], held, rtol=1e-3, atol=1e-6)
        return bool((close.float().mean(dim=(1, 2, 3)) > 0.9).all())

    def holds_at(self, x: Tensor, position: int) -> bool:
        """Whether x [B, H, n, d] are the tokens from `position` on, as far as their codes tell.

        Compared are the first 64 at most, about their mean: keys may be far from zero, all of them alike.
        """
        x = x[:, :, :DROPPED].to(self.sinks.dtype)
        first = position - self.forgotten
        if first < 0 or first + x.shape[2] > len(self):
            return False
        held, x = self.between(first, first + x.shape[2]).float(), x.float()
        spread = (held - held.mean(2, keepdim=True)).square().sum(2)  # [B, H, d]
        error = (x - held).square().sum(2)
        # Where few channels have positions (partial rotary), these alone tell tokens from the same ones elsewhere
        moved = (spread * (error > spread)).sum((1, 2)) > MOVED_SHARE * spread.sum((1, 2))
        return bool((error.sum((1, 2)) < SAME_SHARE * spread.sum((1, 2))).all() and not moved.any())

    def between(self, first: int, last: int) -> Tensor:
        """Tokens held number `first` to `last`, of which only the blocks that have them are reconstructed."""
        S, end = self.sinks.shape[2], self.sinks.shape[2] + self.compressed_tokens
        parts = [self.sinks[:, :, first:last]]
        if first < end and last > S and self.compressed_tokens:
            size = self.compressor.block_tokens
            slots = max(first - S, 0) + self.lead, min(last, end) - S + self.lead
            low, high = slots[0] // size, -(-slots[1] // size)
            encoded = {name: stored.between(low, high) for name, stored in self.blocks.items()}
            parts.append(self.reconstruct(encoded, low)[:, :, slots[0] - low * size : slots[1] - low * size])
        parts.append(self.tail[:, :, max(first - end, 0) : max(last - end, 0)])
        return joined([part for part in parts if part.shape[2]] or parts[:1])

    def _reconstructed_from(self, start_block: int) -> Tensor | None:
        """Reconstruction of the tokens in blocks from `start_block` on, without the lead."""
        if not self.compressed_tokens:
            return None
        if not self.keep_reconstructed or self.compressor.exact:
            return self._reconstruct(start_block)[:, :, 0 if start_block else self.lead :]
        block = self.compressor.block_tokens
        known = 0 if self.reconstructed is None else self.reconstructed.shape[2] // block
        if known < self.compressed_blocks:
            new = self._reconstruct(known)
            self.reconstructed = new if self.reconstructed is None else torch.cat((self.reconstructed, new), dim=2)
        return self.reconstructed[:, :, start_block * block or self.lead :]

    def _reconstruct(self, start_block: int) -> Tensor:
        """Reconstruction of whole blocks from `start_block` on, the lead included."""
        encoded = {name: joined(stored.views())[:, :, start_block:] for name, stored in self.blocks.items()}
        return self.reconstruct(encoded, start_block)

    def reconstruct(self, encoded: Encoded, start_block: int) -> Tensor:
        """Tokens [B, H, n · block_tokens, d] of n encoded blocks, of which the first is block `start_block`."""
        start = self._position(start_block)
        return dispatch.reconstruct(self.compressor, encoded, self.sinks.shape[3], self.sinks.dtype, start)

    def crop(self, tokens: int) -> None:
        """Remove the last `tokens` tokens. Of a block that is cut, what stays becomes the tail, as reconstructed."""
        length, self.visible = len(self) - tokens, None
        if length < 0:
            raise PluginError(f"can't crop {tokens} tokens from a cache of {len(self)}")
        self.own_sinks.crop(self.forgotten + length)
        in_tail = length - self.sinks.shape[2] - self.compressed_tokens
        if in_tail >= 0:
            self.tail = self.tail[:, :, :in_tail].clone()
            return
        after_sinks = max(length - self.sinks.shape[2], 0)
        blocks, rest = divmod(after_sinks + self.lead, self.compressor.block_tokens) if after_sinks else (0, 0)
        rest = min(rest, after_sinks)  # in the first block, without the lead
        kept = self._reconstructed_from(blocks)[:, :, :rest] if rest else self.tail[:, :, :0]
        self.tail = kept.contiguous().clone()
        for stored in self.blocks.values():
            stored.truncate(blocks)
        if self.reconstructed is not None:
            whole = blocks * self.compressor.block_tokens
            self.reconstructed = self.reconstructed[:, :, :whole].clone() if blocks else None
        self.sinks = self.sinks[:, :, :length].clone()

    def tensors(self) -> list[Tensor]:
        """All that is held: sinks, tail, all chunks with what is unused in them, and kept reconstructions."""
        chunks = [chunk for stored in self.blocks.values() for chunk in stored.chunks]
        held = (self.sinks, self.tail, self.reconstructed, *chunks, *self.own_sinks.tensors())
        return [tensor for tensor in held if tensor is not None]

    def nbytes(self) -> int:
        """Bytes of `tensors`, those of one storage counted once."""
        return sum(storages_of(self.tensors()).values())

    def map_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every stored tensor: batch selection, or a move between devices."""
        if self.sinks is None:
            return
        self.sinks, self.tail = fn(self.sinks), fn(self.tail)
        self.own_sinks.map_(fn)
        self.reconstructed = None if self.reconstructed is None else fn(self.reconstructed)
        for stored in self.blocks.values():
            stored.map_(fn)


class Half:
    """K or V of a joint store as attention reads it: a TokenStore of half as many heads, with the codes of both."""

    def __init__(self, store: TokenStore, index: int):
        """index: 0 for K, 1 for V."""
        heads = store.sinks.shape[1] // 2
        self.whole, self.heads = store, slice(index * heads, (index + 1) * heads)
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    def __getattr__(self, name: str):
        return getattr(self.whole, name)

    def __len__(self) -> int:
        return len(self.whole)

    @property
    def sinks(self) -> Tensor:
        return self._own("sinks", self.whole.sinks)

    @property
    def tail(self) -> Tensor:
        return self._own("tail", self.whole.tail)

    def _own(self, name: str, x: Tensor) -> Tensor:
        """This half of x, which the store replaces when it changes; a view is made once, as each costs microseconds."""
        kept = self._parts.get(name)
        if kept is None or kept[0] is not x:
            kept = self._parts[name] = (x, x[:, self.heads])
        return kept[1]


def placed(k: TokenStore | Half, v: TokenStore | Half) -> tuple[dict, ...]:
    """`placed` of all that holds K's and V's blocks, but of K's first tensor: there, or in its `kept`, readers keep it.

    Of all, because a token may widen scales alone; not of the first, which would keep itself and its memory alive.
    """
    stores = (k.whole,) if v.whole is k.whole else (k.whole, v.whole)
    return tuple([stored.placed for store in stores for stored in store.blocks.values()][bool(k.whole.blocks) :])


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

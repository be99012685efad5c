"""Codecs, tokens and a plain reference model for tests of how a cache stores tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor, JointTransform, Quantizer, Transform
from gpt2.compression.codecs.rope import Rotary

H, D = 2, 16  # KV heads and channels, where a test doesn't say otherwise


class BlockInt8(Quantizer):
    """Min and max of every channel over four tokens: a codec that can't encode a token by itself."""

    name, bits, block_tokens = "block-int8", 8, 4

    def quantize(self, z: Tensor) -> dict[str, Tensor]:
        z = z.float().unflatten(2, (-1, self.block_tokens))
        low = z.amin(3, keepdim=True)
        scale = ((z.amax(3, keepdim=True) - low) / 255).clamp_min(1e-6)
        return {"codes": ((z - low) / scale).round().to(torch.uint8), "low": low, "scale": scale}

    def dequantize(self, fields: dict[str, Tensor], rank: int) -> Tensor:
        return (fields["codes"] * fields["scale"] + fields["low"]).flatten(2, 3)


def transform(rank: int, groups: int = H, width: int = D) -> Transform:
    """A random orthonormal basis. In float64, so that the shape of a matmul can't tip a code over."""
    generator = torch.Generator().manual_seed(rank)
    E = torch.linalg.qr(torch.randn(groups, width, width, generator=generator, dtype=torch.float64)).Q[..., :rank]
    return Transform(E, E.mT, torch.randn(groups, width, generator=generator, dtype=torch.float64))


def joint(rank: int, layout: str, d: int = D) -> JointTransform:
    """One basis for K and V of a single head, keys turned by their position."""
    basis = transform(rank, groups=1, width=2 * d)
    return JointTransform(basis.E, basis.D, basis.mean, Rotary(torch.logspace(0, -2, d // 2), layout))


COMPRESSORS = {
    "identity": IdentityCompressor(),
    "int8": Compressor(QUANTIZERS["int8"]),
    "int4": Compressor(QUANTIZERS["int4"]),
    "block": Compressor(BlockInt8()),
    "low-rank": Compressor(QUANTIZERS["none"], transform(9)),
    "low-rank-int4": Compressor(QUANTIZERS["int4"], transform(5)),  # an odd rank: half of the last byte is empty
    "joint-int8": Compressor(QUANTIZERS["int8"], transform(20, groups=1, width=H * D)),
    "low-rank-block": Compressor(BlockInt8(), transform(7)),
    "kv-int8": Compressor(QUANTIZERS["int8"], joint(20, "half")),
    "kv-block": Compressor(BlockInt8(), joint(2 * D, "interleaved")),
}


def tokens(n: int, batch: int = 2, heads: int = H, d: int = D, seed: int = 0, dtype=torch.float32) -> Tensor:
    """[B, H, n, d] as attention makes it: heads and tokens transposed, not contiguous."""
    x = torch.randn(batch, n, heads, d, generator=torch.Generator().manual_seed(seed))
    return (x * (1 + torch.arange(d))).to(dtype).transpose(1, 2)


def filled(compressor: Compressor, layout: tuple[int, int], chunks: list[Tensor] | tuple[Tensor, ...]) -> TokenStore:
    store = TokenStore(compressor, *layout)
    store.prepare(chunks[0], "test")
    for chunk in chunks:
        store.append(chunk)
    return store


def as_sides(compressor: Compressor, x: Tensor) -> tuple[Tensor, Tensor]:
    """K, and V alike, as a model gives them to a layer, and what its stores hold of them."""
    if not compressor.joint:
        return x, x
    side = x[:, : H // 2]
    return side, torch.cat((side, side), dim=1)


class Plain:
    """What should be read of one store, [B, H, T, d]: all tokens in one tensor, each full block coded once."""

    UNIT = 32  # tokens that are coded together where a codec takes each by itself

    def __init__(self, compressor: Compressor, sinks: int, recent: int):
        self.compressor, self.block = compressor, compressor.block_tokens
        self.sinks, self.recent = (0, 0) if compressor.exact else (sinks, recent)
        self.first = self.sinks - self.sinks % self.block  # position of the first block's first place
        self.seen: Tensor | None = None
        self.blocks = 0

    def append(self, x: Tensor) -> None:
        self.seen = x.clone() if self.seen is None else torch.cat((self.seen, x), dim=2)
        full = (self.seen.shape[2] - self.first - self.recent) // self.block
        while self.blocks < full:
            count = min(full - self.blocks, self.UNIT) if self.block == 1 else 1
            self._code(self.first + self.blocks * self.block, count * self.block)
            self.blocks += count

    def _code(self, start: int, tokens: int) -> None:
        own = self.seen[:, :, max(start, self.sinks) : start + tokens]
        x = torch.cat((own[:, :, :1].expand(-1, -1, tokens - own.shape[2], -1), own), dim=2)
        back = self.compressor.reconstruct(self.compressor.compress(x, start), x.shape[3], x.dtype, start)
        self.seen[:, :, max(start, self.sinks) : start + tokens] = back[:, :, tokens - own.shape[2] :]

    def crop(self, tokens: int) -> None:
        length = self.seen.shape[2] - tokens
        self.seen = self.seen[:, :, :length].clone()
        # Of a block that is cut, what is left stays as it was decoded
        whole = (length - self.first) // self.block if length > self.sinks else 0
        self.blocks = min(self.blocks, whole)

    def map_(self, change: Callable[[Tensor], Tensor]) -> None:
        self.seen = change(self.seen)

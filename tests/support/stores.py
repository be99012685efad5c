"""Codecs, tokens and a plain reference model for tests of how a cache stores tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.codecs import QUANTIZERS, Compressor, IdentityCompressor, JointTransform, Quantizer, Transform
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.kernels import dispatch

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


def make_store(compressor: Compressor, layout: tuple[int, int], x: Tensor) -> TokenStore:
    store = TokenStore(compressor, *layout)
    store.prepare(x, "test")
    return store


def filled(compressor: Compressor, layout: tuple[int, int], chunks: list[Tensor] | tuple[Tensor, ...]) -> TokenStore:
    store = make_store(compressor, layout, chunks[0])
    for chunk in chunks:
        store.append(chunk)
    return store


def as_sides(compressor: Compressor, x: Tensor) -> tuple[Tensor, Tensor]:
    """K, and V alike, as a model gives them to a layer, and what its stores hold of them."""
    if not compressor.joint:
        return x, x
    side = x[:, : H // 2]
    return side, torch.cat((side, side), dim=1)


class Reference:
    """All tokens in a list, coded anew, one block at a time, whenever they are read."""

    def __init__(self, compressor: Compressor, layout: tuple[int, int]):
        self.compressor, self.block = compressor, compressor.block_tokens
        self.sinks, self.recent = (0, 0) if compressor.exact else layout
        self.lead = self.sinks % self.block  # places of the first block that sinks have
        self.tokens: list[Tensor] = []  # each [B, H, 1, d]
        self.blocks = 0

    def append(self, x: Tensor) -> None:
        self.tokens += x.split(1, dim=2) if x.shape[2] else ()
        self.blocks = max(self.blocks, (len(self.tokens) - self.start(0) - self.recent) // self.block)

    def start(self, block: int) -> int:
        return self.sinks - self.lead + block * self.block

    def decoded(self, block: int) -> tuple[Tensor, ...]:
        """Tokens of a block behind the sinks, as decoded."""
        start = self.start(block)
        own = self.tokens[max(start, self.sinks) : start + self.block]
        x = torch.cat([own[0]] * (self.block - len(own)) + own, dim=2)
        back = self.compressor.reconstruct(dispatch.compress(self.compressor, x, start), x.shape[3], x.dtype, start)
        return back.split(1, dim=2)[self.block - len(own) :]

    def read(self) -> Tensor:
        coded = [token for block in range(self.blocks) for token in self.decoded(block)]
        return torch.cat(self.tokens[: self.sinks] + coded + self.tokens[self.sinks + len(coded) :], dim=2)

    def crop(self, n: int) -> None:
        length = len(self.tokens) - n
        whole = (length - self.start(0)) // self.block if length > self.sinks else 0
        if whole < self.blocks:  # what stays of a block that is cut is only known as it was decoded
            start = self.start(whole)
            self.tokens[max(start, self.sinks) : start + self.block] = self.decoded(whole)
            self.blocks = whole
        del self.tokens[length:]

    def map_(self, fn) -> None:
        self.tokens = [fn(token) for token in self.tokens]


def assert_same(store: TokenStore, reference: Reference) -> None:
    assert len(store) == len(reference.tokens)
    if reference.tokens:
        torch.testing.assert_close(store.read(), reference.read())
    else:
        assert store.read().shape[2] == 0

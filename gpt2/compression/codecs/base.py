"""The two halves of every codec, and the compressor that joins them.

    codec  =  linear transform   ∘   quantizer
              z = (x − mean) @ E     fields = quantize(z)
              x̂ = ẑ @ D + mean       ẑ = dequantize(fields)

Shapes used throughout:
    x       [B, H, T, d]   K (after RoPE) or V of one layer: batch, KV heads, tokens, head_dim
    group   one or more KV heads that share a basis; their channels side by side, w = d · H / G
    z       [B, G, T, r]   coordinates in the group's basis
    E, D    [G, w, r], [G, r, w]; mean [G, w]. With w = d and a first dimension of 1, every head uses the same one.
    fields  dict of what a quantizer stores, each tensor [B, G, T / block_tokens, …]
    start   position in the sequence of x's first token, for transforms that depend on it
    q       [B, H, M, d] queries of one layer, M to each KV head
    p       [B, H, M, T] what each of them gives to each token
A joint codec sees K and V of a layer as one x of 2H heads, K's first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.formats import Packed
from gpt2.compression.codecs.moments import Moments

Encoded = dict[str, Tensor]  # what a quantizer stores, [B, G, T / block_tokens, …] each
HALF_MAX = torch.finfo(torch.float16).max
SIDES = ("k", "v")


@dataclass(frozen=True)
class Transform:
    """An affine map into r coordinates per group and back. A rank is cut from the full basis by `truncate`."""

    E: Tensor
    D: Tensor
    mean: Tensor

    joint = False  # whether x is K and V of a layer together
    absorbable = True  # the same matrix for every token, so that a query can absorb it and read coordinates

    @property
    def rank(self) -> int:
        return self.E.shape[-1]

    def truncate(self, rank: int) -> Transform:
        """Keep the first `rank` coordinates; the basis is ordered by what it loses least."""
        if not 1 <= rank <= self.rank:
            raise PluginError(
                f"rank {rank} is out of range: this basis has {self.rank} coordinates, use 1 to {self.rank}"
            )
        return replace(self, E=self.E[..., :rank].contiguous(), D=self.D[:, :rank].contiguous())

    def then(self, second: Transform) -> Transform:
        """This transform followed by one of its coordinates, as a single product. Needs D @ E = I."""
        return Transform(self.E @ second.E, second.D @ self.D, self.mean + (second.mean[:, None] @ self.D)[:, 0])

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x [B, H, T, d] → z [B, G, T, r], in the basis's own dtype."""
        grouped = join_heads(x, width=self.E.shape[1]).to(self.E.dtype)
        return (grouped - self.mean[:, None]) @ self.E

    def inverse(self, z: Tensor, head_dim: int, start: int = 0) -> Tensor:
        """z [B, G, T, r] → x̂ [B, H, T, d]."""
        return _split_heads(z.to(self.D.dtype) @ self.D + self.mean[:, None], head_dim)

    def absorb_query(self, q: Tensor) -> Tensor:
        """q [B, H, M, d] → q' [B, G, H/G · M, r + 1], such that q · x̂ = q' · [ẑ, 1]."""
        D = self._affine(q.shape[-1])
        return (q.to(D.dtype).unflatten(1, (-1, D.shape[1])) @ D.mT).flatten(2, 3)

    def reconstruct_sum(self, y: Tensor, head_dim: int) -> Tensor:
        """Sums of [ẑ, 1], y [B, G, H/G · M, r + 1] → sums of x̂, [B, H, M, d]."""
        D = self._affine(head_dim)
        return (y.to(D.dtype).unflatten(2, (D.shape[1], -1)) @ D).flatten(1, 2)

    def _affine(self, head_dim: int) -> Tensor:
        """[D; mean] of the h heads of each group, [G, h, r + 1, d]: x̂ = [ẑ, 1] @ it. Made once."""
        made = self.__dict__.get("_by_head")  # frozen, but this is no part of it
        if made is None or made.shape[-1] != head_dim:
            whole = torch.cat((self.D, self.mean[:, None]), dim=1).unflatten(-1, (-1, head_dim))
            made = self.__dict__["_by_head"] = whole.transpose(1, 2).contiguous()
        return made

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Transform:
        E, D, mean = (part.to(device=device, dtype=dtype) for part in (self.E, self.D, self.mean))
        return replace(self, E=E, D=D, mean=mean)

    def nbytes(self) -> int:
        """Bytes held, with what attention over codes has made of it."""
        parts = (self.E, self.D, self.mean, self.__dict__.get("_by_head"))
        return sum(part.nbytes for part in parts if part is not None)


def join_heads(x: Tensor, width: int) -> Tensor:
    """[B, H, T, d] → [B, G, T, w]: the heads of a group side by side."""
    B, H, T, d = x.shape
    if width == d:
        return x
    groups = H * d // width
    return x.view(B, groups, H // groups, T, d).transpose(2, 3).reshape(B, groups, T, -1)


def _split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, G, T, w] → [B, H, T, d], the inverse of `join_heads`."""
    B, G, T, w = x.shape
    if w == head_dim:
        return x
    return x.view(B, G, T, w // head_dim, head_dim).transpose(2, 3).reshape(B, -1, T, head_dim)


class Quantizer(ABC):
    """Turns coordinates into what is stored, and back.

    `block_tokens` is how many tokens are encoded together: 1 where each token stands for itself. `compress` is
    always given a multiple of it, and every stored tensor has one entry per block in its third dimension, so that
    blocks can be appended, cropped and reordered without looking inside.
    """

    name: str
    bits: float
    block_tokens = 1
    lossless = False
    by_bits = True  # whether a setting's `bits` alone can mean it; else a setting names it
    adjustable = False  # comes in any number of bits per coordinate, through `at`

    def at(self, bits: float) -> Quantizer:
        """This quantizer with another budget. Raises PluginError where it is out of reach."""
        raise PluginError(f"quantizer {self.name} has {self.bits} bits and no others")

    @abstractmethod
    def quantize(self, z: Tensor) -> Encoded:
        """z [B, G, T, r] → fields, each [B, G, T / block_tokens, …]."""

    @abstractmethod
    def dequantize(self, fields: Encoded, rank: int) -> Tensor:
        """What `quantize` gave → ẑ [B, G, T, r]."""

    def plane_search(self, rank: int) -> tuple[int, Sequence[float], Sequence[float]] | None:
        """What a kernel needs to encode blocks of `rank` channels by the search of `mixed`; None for other codes.

        Bytes of a block, and the shares of its range to try for narrow and for wide codes.
        """
        return None

    def packed(self, fields: Encoded, rank: int) -> Packed | None:
        """Fields as kernels know them, which then read codes in the place of `dequantize`; None where none does."""
        return None

    def scores(self, q: Tensor, fields: Encoded, out: Tensor) -> None:
        """Write q · ẑ of every token into out [B, G, M, T] float32; q [B, G, M, r]."""
        z = self.dequantize(fields, q.shape[-1])
        out.copy_(q.to(z.dtype) @ z.mT)

    def weighted_sum(self, p: Tensor, fields: Encoded, rank: int) -> Tensor:
        """Σ p ẑ over tokens, [B, G, M, r]; p [B, G, M, T] float32."""
        z = self.dequantize(fields, rank)
        return p.to(z.dtype) @ z


class Basis(ABC):
    """A way to find a transform for one layer's K or V, best coordinates first."""

    name: str
    calibrated = True  # fitted to statistics, so that its coordinates have an order and a rank can be cut
    joint = False  # one basis for K and V of a layer together
    multi_head = False  # shared by several heads and kept whole, with the error of each width of code measured
    metric = "pca"  # what statistics it is fitted to

    @abstractmethod
    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        """Fit every KV head of a layer. Returns the transform at full rank, and its spectrum: variance, [H, r]."""

    def full_rank(self, width: int) -> int:
        """Coordinates of the transform at full rank for vectors of `width` channels."""
        return width


class FixedBasis(Basis):
    """A basis that is known without calibration and the same for all heads."""

    calibrated = False

    @abstractmethod
    def transform(self, width: int) -> Transform:
        """For vectors of `width` channels: E [1, width, r], D [1, r, width], mean [1, width], float64."""

    @abstractmethod
    def full_rank(self, width: int) -> int:
        """Coordinates of `transform`, without making it."""

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        transform = self.transform(moments.mean.shape[-1])
        return transform, moments_through(moments, transform, layer).covariance(0).diagonal(dim1=-2, dim2=-1)


def moments_through(moments: Moments, transform: Transform, layer: int) -> Moments:
    """Moments of one layer in a transform's coordinates, as those of a model that has this layer alone."""
    E = transform.E.to(moments.scatter.dtype)
    mean = ((moments.mean[layer] - transform.mean)[:, None] @ E)[:, 0]
    D = transform.D.to(E.dtype)  # an error of coordinates is felt as what it becomes
    metrics = {name: (D @ metric[layer] @ D.mT)[None] for name, metric in moments.metrics.items()}
    scatter = (E.mT @ moments.scatter[layer] @ E)[None]
    return Moments(moments.count[layer : layer + 1], mean[None], scatter, metrics)


class Composed(Basis):
    """One basis after another, `first+second`: the second is fitted to the coordinates of the first."""

    def __init__(self, first: Basis, second: Basis):
        self.first, self.second = first, second
        self.name = f"{first.name}+{second.name}"
        self.calibrated = second.calibrated
        if first.multi_head or second.multi_head:
            raise PluginError(f"codec {self.name}: a basis of several heads doesn't combine with another")
        if first.calibrated and not second.calibrated:  # its coordinates would lose their order
            raise PluginError(f"codec {self.name}: {second.name} needs no calibration and can only come first")

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        first, _ = self.first.fit(moments, layer)
        second, spectrum = self.second.fit(moments_through(moments, first, layer), 0)
        return first.then(second), spectrum

    def transform(self, width: int) -> Transform:
        """As `FixedBasis.transform`, where both halves are fixed."""
        first = self.first.transform(width)
        return first.then(self.second.transform(first.rank))

    def full_rank(self, width: int) -> int:
        return self.second.full_rank(self.first.full_rank(width))


class Compressor:
    """Codec of one layer's K or V: an optional transform and a quantizer. Holds no cached token, so caches share it."""

    def __init__(self, quantizer: Quantizer, transform: Transform | None = None):
        self.quantizer = quantizer
        self.transform = transform
        self._elsewhere: dict[torch.device, Compressor] = {}

    def __deepcopy__(self, memo: dict) -> Compressor:
        """A copied cache shares its compressors, as every other cache does."""
        return self

    @property
    def exact(self) -> bool:
        """Whether what comes back is bit for bit what went in."""
        return self.transform is None and self.quantizer.lossless

    @property
    def joint(self) -> bool:
        """Whether it takes K and V of a layer as one tensor of 2H heads."""
        return self.transform is not None and self.transform.joint

    @property
    def block_tokens(self) -> int:
        return self.quantizer.block_tokens

    def coordinates(self, x: Tensor, start: int = 0) -> Tensor:
        """x [B, H, T, d] from position `start` on → z [B, G, T, r], as the quantizer takes them."""
        z = x if self.transform is None else self.transform.forward(x, start)
        # What isn't quantized is held in the model's dtype, not in the basis's
        return z.to(x.dtype) if self.quantizer.lossless else z

    def compress(self, x: Tensor, start: int = 0) -> Encoded:
        """x [B, H, T, d] from position `start` on → fields; T a multiple of `block_tokens`."""
        return self.quantizer.quantize(self.coordinates(x, start))

    def reconstruct(self, fields: Encoded, head_dim: int, dtype: torch.dtype, start: int = 0) -> Tensor:
        """What `compress` gave → x̂ [B, H, T, d] in `dtype`; start: position of the first token."""
        z = self.quantizer.dequantize(fields, self.transform.rank if self.transform else head_dim)
        x = z if self.transform is None else self.transform.inverse(z, head_dim, start)
        if dtype == torch.float16 and x.dtype != dtype:  # a step beyond the largest number would be infinite
            x = x.clamp(-HALF_MAX, HALF_MAX)
        return x.to(dtype)

    @property
    def readable(self) -> bool:
        """Whether queries can read what is stored: `scores` and `weighted_sum` work."""
        return self.transform is None or self.transform.absorbable

    @property
    def affine(self) -> bool:
        """Whether folded queries and sums have a last coordinate that stands for the mean."""
        return self.transform is not None

    def absorb_query(self, q: Tensor) -> Tensor:
        """As `Transform.absorb_query`, q itself where there is no transform."""
        return q if self.transform is None else self.transform.absorb_query(q)

    def reconstruct_sum(self, y: Tensor, head_dim: int) -> Tensor:
        """As `Transform.reconstruct_sum`, y itself where there is no transform."""
        return y if self.transform is None else self.transform.reconstruct_sum(y, head_dim)

    def groups(self, heads: int, head_dim: int) -> int:
        """Groups that so many heads make: one each where every head has a basis, or the same."""
        return heads if self.transform is None else heads * head_dim // self.transform.mean.shape[-1]

    def to(self, device: torch.device) -> Compressor:
        """This compressor on a device: itself if it is there already, else a copy that all caches there share."""
        if self.transform is None or self.transform.E.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Compressor(self.quantizer, self.transform.to(device))
        return self._elsewhere[device]

    def check_shape(self, heads: int, head_dim: int, where: str) -> None:
        """Raise PluginError unless the transform fits a cache of `heads` KV heads of `head_dim` channels."""
        if self.transform is None:
            return
        groups, width, _ = self.transform.E.shape
        shared = width == head_dim and groups == 1
        if not shared and (groups * width != heads * head_dim or width % head_dim):
            raise PluginError(
                f"{where}: the codec was calibrated for {groups} groups of {width} channels, but the model has "
                f"{heads} KV heads of {head_dim}: calibrate this model"
            )

    def nbytes(self) -> int:
        """Bytes of the transform: shared by all sequences, as weights are."""
        return self.transform.nbytes() if self.transform else 0

    def __repr__(self) -> str:
        rank = f", rank={self.transform.rank}" if self.transform else ""
        return f"{type(self).__name__}({self.quantizer.name}{rank})"

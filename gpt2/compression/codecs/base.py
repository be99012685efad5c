"""What a codec is: a basis, fitted to one layer's K or V, and a quantizer of the coordinates in it.

    codec  =  linear transform   ∘   quantizer
              z = (x − mean) @ E     encoded = quantize(z)
              x̂ = ẑ @ D + mean       ẑ = dequantize(encoded)

`Basis` and `Quantizer` are the contract: what the rest of the program needs to know of a codec is an attribute or a
method of one of them, and nothing outside this package asks which codec it has. A new one is a file here and a name in
the registry (`codecs/__init__.py`).

Shapes used throughout:
    x        [B, H, T, d]   K (after RoPE) or V of one layer: batch, KV heads, tokens, channels of a head. Layers may
                            differ in H and d, and so may K and V of one
    group    one or more KV heads that share a basis; their channels side by side, w = d · H / G
    z        [B, G, T, r]   coordinates in the group's basis
    E, D     [G, w, r], [G, r, w]; mean [G, w]. With w = d and a first dimension of 1, every head uses the same one.
    encoded  what a quantizer stores: named tensors, [B, G, n, …] each, of n blocks of `block_tokens` tokens
    start    position in the sequence of x's first token, for transforms that depend on it
    q        [B, H, M, d]   queries of one layer, M to each KV head
    p        [B, H, M, T]   attention weights
A joint codec sees K and V of a layer as one x of 2H heads, K's first; it needs both in one shape.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.formats import Encoding, Format
from gpt2.compression.codecs.moments import Moments, Seen
from gpt2.compression.codecs.transform import Transform
from gpt2.models.geometry import Geometry

Encoded = dict[str, Tensor]
HALF_MAX = torch.finfo(torch.float16).max
WIDE_MAX = 2.0**100  # of metadata in float32, so that no product of it with a code is infinite
FEWEST_CHECKED = 16  # tokens that are worth waiting for a GPU to look at their size
SIDES = ("k", "v")
UNWEIGHTED = "pca"  # the metric of bases that weigh every error alike


class Allocation(Protocol):
    """How a calibration shares out bits, by what coding each fitted basis costs: `calibration.bit_allocation`."""

    def bits_of_each(self, bits: float) -> list[float]:
        """Bits per coordinate of every basis, `bits` on average."""

    def widths(self, bits: float) -> Sequence[Tensor]:
        """Index into `formats.WIDTHS` of every channel, [G, w] for each basis, of `bits` per coordinate on average."""


class Quantizer(ABC):
    """Turns coordinates into what is stored, and back.

    Blocks can be appended, cropped and reordered without looking inside: `quantize` is always given a multiple of
    `block_tokens` tokens, every block is encoded by itself, and every stored tensor has blocks as its third dimension.
    """

    name: str
    bits: float  # per coordinate; without metadata, or everything counted where `bits_range` is set
    block_tokens = 1  # how many tokens are encoded together
    lossless = False
    by_bits = False  # whether a preset's `bits` alone means it; else the preset names it
    bits_range: tuple[float, float] | None = None  # for a quantizer that takes any number of bits in a range
    calibrated = False  # works only as `allocated` returns it
    memory_format: Format | None = None  # how codes lie in memory, for kernels that read them; None: PyTorch reads them
    largest = HALF_MAX  # size up to which any coordinates can be stored; larger ones may be cut off at some size

    @property
    def adjustable(self) -> bool:
        """Whether it takes any number of bits in a range, through `at`."""
        return self.bits_range is not None

    def at(self, bits: float) -> Quantizer:
        """This quantizer with another budget. Raises PluginError where it is out of range."""
        if self.bits_range is None:
            raise PluginError(f"quantizer {self.name} has {self.bits} bits and no others")
        low, high = self.bits_range
        if not low <= bits <= high:
            raise PluginError(f"bits {bits!r}: quantizer {self.name} takes {low:g} to {high:g} bits per coordinate")
        other = copy.copy(self)
        other.bits = float(bits)
        return other

    def allocated(self, allocation: Allocation, index: int) -> Quantizer:
        """This quantizer for basis number `index` of a calibration, where `bits` is meant on average over all."""
        return self

    @abstractmethod
    def quantize(self, z: Tensor) -> Encoded:
        """z [B, G, T, r] → what is stored, [B, G, T / block_tokens, …] each."""

    @abstractmethod
    def dequantize(self, encoded: Encoded, rank: int) -> Tensor:
        """What `quantize` returned → ẑ [B, G, T, r]."""

    def nbytes(self) -> int:
        """Bytes of tensors that the quantizer holds itself, as widths that a calibration chose."""
        return 0

    def fits(self, encoded: Encoded, rank: int) -> bool:
        """Whether codes of the right shapes and kinds, from a file, stay within their blocks where they are read.

        Kernels read what `quantize` stored without checking it, so a quantizer whose values say where others lie looks.
        """
        return True

    def block_layout(self, groups: int, rank: int, dtype: torch.dtype) -> Encoded:
        """What `quantize` stores of one block of so many coordinates [1, G, block_tokens, r], on the meta device.

        By default known from a block of zeros that is really quantized; a quantizer that searches states it instead.
        """
        return _of_zeros(self, groups, rank, dtype)

    def encoding(self, rank: int) -> Encoding | None:
        """How codes are chosen, for kernels that can do it in the place of `quantize`; None: PyTorch does it."""
        return None

    def kernel_tensors(self, encoded: Encoded) -> list[Tensor]:
        """Tensors in the order of `memory_format`."""
        return list(encoded.values())

    def scores(self, q: Tensor, encoded: Encoded, out: Tensor) -> None:
        """Write q · ẑ of every token into out [B, G, M, T] float32; q [B, G, M, r].

        q [B, G, n, M, r]: one of n equal shares of the tokens for each, as `Transform.absorb_query` has them.
        """
        z = self.dequantize(encoded, q.shape[-1])
        if q.ndim == 4:
            out.copy_(q.to(z.dtype) @ z.mT)
        else:
            x = q.to(z.dtype) @ z.unflatten(2, (q.shape[2], -1)).mT  # [B, G, n, M, T / n]
            out.copy_(x.transpose(2, 3).flatten(3))

    def weighted_sum(self, p: Tensor, encoded: Encoded, rank: int) -> Tensor:
        """Σ p ẑ over tokens, [B, G, M, r]; p [B, G, M, T] float32."""
        z = self.dequantize(encoded, rank)
        return p.to(z.dtype) @ z


@lru_cache(maxsize=64)  # layers of a model share quantizers and shapes
def _of_zeros(quantizer: Quantizer, groups: int, rank: int, dtype: torch.dtype) -> Encoded:
    made = quantizer.quantize(torch.zeros(1, groups, quantizer.block_tokens, rank, dtype=dtype))
    return {name: field.to("meta") for name, field in made.items()}


def waits(z: Tensor) -> bool:
    """Whether to look at the size of coordinates z [B, G, T, r] isn't worth it: of few tokens on a GPU.

    It would wait for the GPU in every layer of every step.
    """
    return z.device.type != "cpu" and z.shape[2] < FEWEST_CHECKED


def beyond_half(z: Tensor) -> bool:
    """Whether coordinates z [B, G, T, r] exceed float16, so that metadata must be stored in float32.

    Where it `waits`, they are taken not to.
    """
    if waits(z) or z.dtype == torch.float16 or not z.numel() or isinstance(z, FakeTensor):
        return False
    low, high = torch.aminmax(z.detach())
    return max(-float(low), float(high)) > HALF_MAX


class Basis(ABC):
    """A way to find the transform of one layer's K or V, best coordinates first."""

    name: str
    calibrated = True  # fitted to statistics of a text, which a calibration holds
    ranked = True  # fitted to keep what matters in the first coordinates, so that a rank can be cut
    joint = False  # one basis for K and V of a layer together, which then have the same codec
    multi_head = False  # shared by heads: fitted to statistics of its own and kept whole (`multi_head.MultiHead`)
    metric = UNWEIGHTED  # name of the metric that weighs errors: its own, or that of another basis
    gradients = False  # whether that metric takes a backward pass
    unrotated = False  # whether rotary positions are taken off keys first
    searched = True  # whether a search through all codecs tries it

    @abstractmethod
    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        """Fit every KV head of a layer. Returns the transform at full rank, and its spectrum: variance, [H, r]."""

    def full_rank(self, width: int) -> int:
        """Coordinates of the transform at full rank for vectors of `width` channels."""
        return width

    @property
    def bound_to_positions(self) -> bool:
        """Whether it is fitted to keys as they are cached, which rotate with their positions.

        Such a basis of K holds at positions like those that its calibration had, and less and less beyond them.
        """
        return self.calibrated and not self.unrotated

    @property
    def demand(self) -> tuple[bool, bool]:
        """Orders bases by what a calibration has to gather for them."""
        return self.gradients, self.metric != UNWEIGHTED

    @property
    def per_head(self) -> str:
        """Name of the basis in the same metric that has single heads: its own, unless heads share it."""
        return self.name

    def metric_vectors(self, seen: Seen) -> dict[str, Tensor]:
        """What its own metric is gathered from: by side, "k" or "v", vectors [H, n, d] of one layer in one window.

        The metric of a side is their second moment over a text, [H, d, d] per layer. Asked in the backward pass where
        `gradients` is set, else in the forward pass; without the sides that have no metric, or none in this layer.
        """
        return {}

    def metric_from_weights(self, model: torch.nn.Module, geometry: Geometry) -> dict[str, list[Tensor | None]]:
        """Metrics by side that a model's weights give without any text.

        [H, d, d] float64 for every layer, None where its weights don't tell.
        """
        return {}


class FixedBasis(Basis):
    """A basis that is known without calibration and the same for all heads."""

    calibrated = ranked = False

    @abstractmethod
    def transform(self, width: int) -> Transform | None:
        """For vectors of `width` channels: E [1, width, r], D [1, r, width], mean [1, width], float64.

        None where nothing is to be done.
        """

    @abstractmethod
    def full_rank(self, width: int) -> int:
        """Coordinates of `transform`, without making it."""

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        transform = self.transform(moments.mean[layer].shape[-1])
        return transform, moments.through(transform, layer).covariance(0).diagonal(dim1=-2, dim2=-1)


class Identity(FixedBasis):
    """No basis at all: the quantizer works on the model's own channels."""

    name = "identity"

    def transform(self, width: int) -> None:
        return None

    def full_rank(self, width: int) -> int:
        return width


class Composed(Basis):
    """One basis after another, `first+second`: the second is fitted to the coordinates of the first.

    Raises PluginError for two that don't combine.
    """

    def __init__(self, first: Basis, second: Basis):
        self.first, self.second = first, second
        self.name = f"{first.name}+{second.name}"
        self.calibrated = self.ranked = second.calibrated
        # The more demanding metric decides what a calibration must hold
        demanding = max(first, second, key=lambda basis: basis.demand)
        self.metric, self.gradients = demanding.metric, demanding.gradients
        if first.multi_head or second.multi_head:
            raise PluginError(f"codec {self.name}: a basis that heads share doesn't combine with another")
        if first.calibrated and not second.calibrated:  # its coordinates would lose their order
            raise PluginError(f"codec {self.name}: {second.name} needs no calibration and can only come first")

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        first, _ = self.first.fit(moments, layer)
        second, spectrum = self.second.fit(moments.through(first, layer), 0)
        return first.then(second), spectrum

    def transform(self, width: int) -> Transform:
        """As `FixedBasis.transform`, where both halves are fixed."""
        first = self.first.transform(width)
        return first.then(self.second.transform(first.rank))

    def full_rank(self, width: int) -> int:
        return self.second.full_rank(self.first.full_rank(width))

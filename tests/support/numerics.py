"""Codecs fitted to hard keys and values (`hostile.py`), and how much each may lose: the claim of test_numerics.py."""

from __future__ import annotations

import functools

import torch
from hostile import CHANNELS, SIZES, hostile
from torch import Tensor

from gpt2.compression.calibration.multi_head_fit import MultiHeadFit, fit_multi_head
from gpt2.compression.calibration.statistics import MultiHeadStatistics
from gpt2.compression.codecs import BASES, IDENTITY, QUANTIZERS, Compressor, Quantizer, Transform, basis_of
from gpt2.compression.codecs.mixed import MixedFixed
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.rope import Rotary
from gpt2.models.geometry import Geometry

BY_TOKEN, BY_BLOCK = ("int8", "int4"), ("int8_channel", "int4_channel", "mixed")
CODED = (*BY_TOKEN, *BY_BLOCK)
BASIS_NAMES = (IDENTITY, "hadamard", "ln_nullspace", "pca", "random", "attention", "fisher", "grouped", "joint")
EXACT_BASES = [name for name in BASIS_NAMES if name not in (IDENTITY, "ln_nullspace")]
FITTED_ON = ("the same", "noise")
HALF_ULP = 2.0**-11  # of float16: what a 16-bit cache loses anyway
SMALLEST_STEP = 2.0**-17
TOLERANCE = 1.1
GATHERED = ("five tokens", "channels of 1e-6 to 1e4", "outlier channels")
END = "near float16's end"
ROTATED = "biases rotated by positions"
SMALL: tuple[int, int, int, int] = (2, 2, 128, 16)


@functools.cache
def metric(groups: int, w: int) -> Tensor:
    """How errors weigh: some directions a hundred times as much as others, [G, w, w] float64."""
    g = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(groups, w, w, generator=g, dtype=torch.float64)).Q
    return axes * torch.logspace(0, -4, w, dtype=torch.float64) @ axes.mT


def moments_of(x: Tensor, codec: str = "pca", weights: Tensor | None = None) -> Moments:
    """Of x [B, G, T, w], with the metric that a codec needs."""
    moments = Moments.zeros(Geometry.uniform(1, x.shape[1], x.shape[3]))
    moments.update(0, x)
    if basis_of(codec).metric != "pca":
        moments.metrics[basis_of(codec).metric] = (metric(x.shape[1], x.shape[3]) if weights is None else weights)[None]
    return moments


def rotary(d: int) -> Rotary:
    return Rotary(1e6 ** (-torch.arange(0, d, 2) / d))


def fit_heads(codec: str, x: Tensor, case: str, weights: Tensor | None = None) -> MultiHeadFit:
    """Fitted to keys x [B, H, T, d], and for the joint codec to other values of the same kind."""
    basis, rotation = BASES[codec], rotary(x.shape[3])
    k, v = halves(x, case) if basis.joint else (x, x)
    entry = basis.arrange(k, v, rotation, 0)[0]
    sample = entry.transpose(0, 1).flatten(1, 2).clamp(-65504, 65504).half()
    rotations = [rotation] if basis.unrotated else []
    moments = moments_of(entry, codec, weights)
    count = 1 if basis.joint else 2  # K and V of a layer are two entries: twice the same
    metrics = {name: list(m) * count for name, m in moments.metrics.items()}
    moments = Moments(moments.count.repeat(count), moments.mean * count, moments.scatter * count, metrics)
    return fit_multi_head(MultiHeadStatistics(basis, moments, rotations, [sample] * count))


def halves(x: Tensor, case: str) -> tuple[Tensor, Tensor]:
    """Keys, which are rotated by position, and values of the same kind in another order."""
    return x if case == ROTATED else rotary(x.shape[3]).rotate(x, 0), x.flip(2)


def given(codec: str, x: Tensor, case: str) -> Tensor:
    """x as a codec takes it: keys and values side by side where it is joint."""
    return torch.cat(halves(x, case), dim=1) if basis_of(codec).joint else x


def compressor(codec: str, quantizer: str, case: str, shape: tuple, fitted_on: str = "the same") -> Compressor:
    """Fitted to another sample than seed 0 gives; mixed widths have the bits that int4 takes with its metadata."""
    sample = case if fitted_on == "the same" else "plain"
    own = QUANTIZERS[quantizer].at(int4_bits(shape)) if QUANTIZERS[quantizer].adjustable else QUANTIZERS[quantizer]
    if isinstance(own, MixedFixed):
        own = MixedFixed(own.bits, fit_of_heads(codec, sample, shape).allocation.widths(own.bits)[0])
    return Compressor(own, transform_of(codec, sample, shape))


@functools.cache
def transform_of(codec: str, sample: str, shape: tuple) -> Transform | None:
    if codec == IDENTITY:
        return None
    basis = basis_of(codec)
    if basis.multi_head:
        return fit_of_heads(codec, sample, shape).transform(0)
    if not basis.calibrated:
        return basis.transform(shape[3]).to("cpu", torch.float32)
    return basis.fit(moments_of(sampled(sample, shape), codec), 0)[0].to("cpu", torch.float32)


@functools.cache
def fit_of_heads(codec: str, case: str, shape: tuple) -> MultiHeadFit:
    return fit_heads(codec, sampled(case, shape), case)


def sampled(case: str, shape: tuple) -> Tensor:
    """What is calibrated on: more tokens than a joint basis has channels."""
    B, H, T, d = shape
    return hostile(case, (B, H, 3 * T, d), seed=1)


def int4_bits(shape: tuple) -> float:
    return 4 + 32 / shape[3]


def stored_bits(quantizer: Quantizer, shape: tuple) -> float:
    metadata = {"int8": 32 / shape[3], "int4": 32 / shape[3], "int8_channel": 24 / 64, "int4_channel": 24 / 64}
    return quantizer.bits + metadata.get(quantizer.name, 0)


def round_trip(c: Compressor, x: Tensor) -> Tensor:
    return c.reconstruct(c.compress(x), x.shape[3], x.dtype)


def lost(codec: str, back: Tensor, x: Tensor) -> float:
    """Squared error in total, in the codec's metric; x as `given`, [B, H, T, d]."""
    error = back.double() - x.double()
    if basis_of(codec).metric == "pca":
        return float(error.square().sum())
    if basis_of(codec).multi_head:
        k, v = error.chunk(2, dim=1) if basis_of(codec).joint else (error, error)
        error = BASES[codec].arrange(k, v, rotary(x.shape[3]), 0)[0]
    return float(torch.einsum("bgti,gij,bgtj->", error, metric(error.shape[1], error.shape[3]), error))


def allowed(codec: str, quantizer: Quantizer, x: Tensor) -> float:
    """What int4 per token loses of x, with the worth of bits that a codec has less, and what 16 bits lose anyway."""
    int4 = lost(codec, round_trip(Compressor(QUANTIZERS["int4"]), x), x)
    worth = 4 ** max(int4_bits(x.shape) - stored_bits(quantizer, x.shape), 0)
    return TOLERANCE * worth * int4 + float(((HALF_ULP * x.double()).square() + SMALLEST_STEP**2).sum())


def held(codec: str, quantizer: str, case: str, fitted_on: str) -> bool:
    """Whether the claim of this module is about them."""
    if codec == IDENTITY:
        return case not in SIZES
    if codec == "ln_nullspace" or case not in CHANNELS or (case == END and fitted_on == "noise"):
        return False
    if quantizer in BY_BLOCK or fitted_on == "noise":
        return quantizer in BY_BLOCK
    return quantizer == "mixed_fixed" or (codec in ("pca", "random") and case not in GATHERED)

"""Registry of codecs. A new basis, metric or quantizer is one file here and one name in a line below.

A codec's name is `identity`, a basis, or bases joined by `+`, applied in that order: `ln_nullspace+pca`.
"""

from __future__ import annotations

import difflib
from functools import reduce

from gpt2.common.errors import PluginError, brief
from gpt2.compression.codecs.base import Basis, Composed, FixedBasis, Identity, Quantizer
from gpt2.compression.codecs.compressor import Compressor, IdentityCompressor
from gpt2.compression.codecs.framed import Framed
from gpt2.compression.codecs.grouped import Grouped
from gpt2.compression.codecs.hadamard import Hadamard
from gpt2.compression.codecs.integer import Int4, Int8
from gpt2.compression.codecs.joint import Joint
from gpt2.compression.codecs.ln_nullspace import LayerNormNullspace
from gpt2.compression.codecs.metric import Attention, Fisher
from gpt2.compression.codecs.mixed import Mixed, MixedFixed
from gpt2.compression.codecs.multi_head import JointTransform, MultiHead
from gpt2.compression.codecs.none import Unquantized
from gpt2.compression.codecs.pca import PCA
from gpt2.compression.codecs.per_channel import Int4Channel, Int8Channel
from gpt2.compression.codecs.random_projection import RandomProjection
from gpt2.compression.codecs.transform import Transform

BASES: dict[str, Basis] = {
    basis.name: basis()
    for basis in (PCA, Attention, Fisher, Framed, Grouped, Joint, RandomProjection, LayerNormNullspace, Hadamard)
}
QUANTIZERS: dict[str, Quantizer] = {
    q.name: q() for q in (Unquantized, Int8, Int4, Int8Channel, Int4Channel, Mixed, MixedFixed)
}
# The quantizer that a setting means which names bits alone
BITS = {quantizer.bits: name for name, quantizer in QUANTIZERS.items() if quantizer.by_bits}
IDENTITY = Identity.name
CODECS = (IDENTITY, *BASES)
if len(BITS) < sum(quantizer.by_bits for quantizer in QUANTIZERS.values()):
    raise ImportError("two quantizers have `by_bits` and the same `bits`, which presets tell them apart by")

__all__ = [
    "BASES",
    "BITS",
    "CODECS",
    "IDENTITY",
    "QUANTIZERS",
    "Basis",
    "Compressor",
    "FixedBasis",
    "IdentityCompressor",
    "JointTransform",
    "MultiHead",
    "Quantizer",
    "Transform",
    "adjustable_quantizers",
    "bases_in",
    "basis_of",
    "codec_name",
    "full_rank",
    "gathered_metrics",
    "metric_names",
    "multi_head_bases",
    "needs_calibration",
    "quantizer_for_bits",
    "quantizer_of",
    "takes_gradients",
]


# --- quantizers


def quantizer_for_bits(bits: int) -> Quantizer:
    """The quantizer of a preset's `bits`. Raises PluginError for a width that doesn't exist."""
    if bits not in BITS:
        raise PluginError(f"bits {bits!r} is not available: use {', '.join(map(str, sorted(BITS)))}")
    return QUANTIZERS[BITS[bits]]


def quantizer_of(name: str | None, bits: float) -> Quantizer:
    """A quantizer by name, at `bits` where it is adjustable; without a name, the one that `bits` means."""
    if name is None:
        return quantizer_for_bits(bits)
    if not isinstance(name, str) or name not in QUANTIZERS:
        near = difflib.get_close_matches(str(name)[:80], QUANTIZERS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise PluginError(f"unknown quantizer {brief(name)}{hint} (there are: {', '.join(QUANTIZERS)})")
    quantizer = QUANTIZERS[name]
    if quantizer.adjustable:
        return quantizer.at(bits)
    if bits != quantizer.bits:
        raise PluginError(f"bits {bits!r}: quantizer {name} has {quantizer.bits}")
    return quantizer


def adjustable_quantizers() -> list[str]:
    """Names of quantizers that take any number of bits; the first is meant where none is named."""
    return [name for name, quantizer in QUANTIZERS.items() if quantizer.adjustable]


# --- bases


def basis_of(codec: str) -> Basis:
    """The basis of a codec, composed where its name has several. Raises PluginError for a name that makes none."""
    names = bases_in(codec)
    return reduce(Composed, [BASES[name] for name in names]) if names else Identity()


def bases_in(codec: str) -> list[str]:
    """Names of the bases that a codec applies, in that order; none of identity."""
    return [part for part in codec_name(codec).split("+") if part != IDENTITY]


def codec_name(name: str) -> str:
    """Check a codec's name. Raises PluginError with the nearest one for a name that isn't registered."""
    parts = str(name).split("+")
    for part in parts:
        if part not in BASES and (part != IDENTITY or len(parts) > 1):
            near = difflib.get_close_matches(part[:80], CODECS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise PluginError(
                f"unknown codec {brief(name)}{hint} (there are: {', '.join(CODECS)}, and bases joined by +)"
            )
    return name


def needs_calibration(codec: str) -> bool:
    """Whether a codec's basis is fitted to statistics."""
    return basis_of(codec).calibrated


def full_rank(codec: str, head_dim: int) -> int:
    """Coordinates that a codec stores of a head's vector when no rank is cut. Raises PluginError where none is left."""
    rank = basis_of(codec).full_rank(head_dim)
    if rank < 1:
        raise PluginError(f"codec {codec} leaves nothing of a head_dim of {head_dim}")
    return rank


def multi_head_bases() -> dict[str, MultiHead]:
    """Registered bases that heads share, by name; the first is meant where none is named."""
    return {name: basis for name, basis in BASES.items() if basis.multi_head}


# --- metrics


def metric_names() -> list[str]:
    """Metrics that bases weigh errors by: pca for none, and those that the registered bases bring with them."""
    return [name for name, basis in BASES.items() if basis.metric == name]


def takes_gradients(metric: str) -> bool:
    """Whether a metric is gathered in a backward pass; False for one that isn't registered."""
    return metric in BASES and BASES[metric].gradients


def gathered_metrics(gradients: bool) -> dict[str, Basis]:
    """Metrics that a pass gathers, by name: those of the backward pass with `gradients`, else of the forward pass."""
    return {name: BASES[name] for name in metric_names() if BASES[name].gradients == gradients}

"""Registry of codecs. A new way to fit a basis, or a new quantizer, is one file here and one name in a line below.

A codec's name is `identity`, a basis, or bases joined by `+`, applied in that order: `ln_nullspace+pca`.
"""

from __future__ import annotations

import difflib
from functools import reduce

from gpt2.common.errors import PluginError, brief
from gpt2.compression.codecs.base import Basis, Composed, Compressor, FixedBasis, Quantizer, Transform
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

BASES: dict[str, Basis] = {
    basis.name: basis()
    for basis in (PCA, Attention, Fisher, Joint, Grouped, RandomProjection, LayerNormNullspace, Hadamard)
}
QUANTIZERS: dict[str, Quantizer] = {
    q.name: q() for q in (Unquantized, Int8, Int4, Int8Channel, Int4Channel, Mixed, MixedFixed)
}
# What a setting means that names its bits and no quantizer
BITS = {quantizer.bits: name for name, quantizer in QUANTIZERS.items() if quantizer.by_bits}
IDENTITY = "identity"  # no basis at all: the quantizer works on the model's own channels
CODECS = (IDENTITY, *BASES)
if len(BITS) < sum(quantizer.by_bits for quantizer in QUANTIZERS.values()):
    raise ImportError("two quantizers have the same `bits`, which presets tell them apart by")

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
    "bases_in",
    "basis_of",
    "codec_name",
    "full_rank",
    "is_joint",
    "is_measured",
    "multi_head_bases",
    "metric_of",
    "needs_calibration",
    "quantizer_for_bits",
    "quantizer_of",
    "single_heads",
]


class IdentityCompressor(Compressor):
    """Stores K or V as the model made them."""

    def __init__(self):
        super().__init__(QUANTIZERS["none"])


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


def is_joint(codec: str) -> bool:
    """Whether a codec has one basis for K and V of a layer together."""
    basis = basis_of(codec)
    return basis is not None and basis.joint


def is_measured(codec: str) -> bool:
    """Whether a codec's basis is of several heads and kept whole, with what each width of code costs measured."""
    basis = basis_of(codec)
    return basis is not None and basis.multi_head


def multi_head_bases() -> dict[str, MultiHead]:
    """Registered codecs of several heads by name; the first is meant where none is named."""
    return {name: basis for name, basis in BASES.items() if basis.multi_head}


def single_heads(codec: str) -> str:
    """A codec itself, or where that is of several heads, the basis of single heads in the same metric."""
    return metric_of(codec) if is_measured(codec) else codec


def bases_in(codec: str) -> list[str]:
    """Names of the bases that a codec applies, in that order; none of identity."""
    return [part for part in codec_name(codec).split("+") if part != IDENTITY]


def metric_of(codec: str) -> str:
    """The statistics that a codec is fitted to: pca, attention or fisher; what is named first weighs most."""
    metrics = {BASES[part].metric for part in bases_in(codec)}
    return next((metric for metric in ("fisher", "attention") if metric in metrics), "pca")


def basis_of(codec: str) -> Basis | None:
    """The basis of a codec, composed where its name has several; None for identity."""
    parts = [BASES[part] for part in bases_in(codec)]
    return reduce(Composed, parts) if parts else None


def needs_calibration(codec: str) -> bool:
    """Whether a codec is fitted to statistics; only such a codec has a rank to cut."""
    basis = basis_of(codec)
    return basis is not None and basis.calibrated


def full_rank(codec: str, head_dim: int) -> int:
    """Coordinates that a codec stores of a head's vector when no rank is cut."""
    basis = basis_of(codec)
    rank = basis.full_rank(head_dim) if basis else head_dim
    if rank < 1:
        raise PluginError(f"codec {codec} leaves nothing of a head_dim of {head_dim}")
    return rank


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

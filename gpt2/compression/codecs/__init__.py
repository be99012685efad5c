"""Registry of codecs. A new way to fit a basis, or a new quantizer, is one file here and one name in a line below."""

from __future__ import annotations

import difflib

from gpt2.compression.codecs.base import Basis, Compressor, Quantizer, Transform
from gpt2.compression.codecs.integer import Int4, Int8
from gpt2.compression.codecs.none import Unquantized
from gpt2.compression.codecs.pca import PCA
from gpt2.compression.codecs.random_projection import RandomProjection
from gpt2.errors import PluginError

BASES: dict[str, Basis] = {basis.name: basis() for basis in (PCA, RandomProjection)}
QUANTIZERS: dict[str, Quantizer] = {q.name: q() for q in (Unquantized, Int8, Int4)}
BITS = {quantizer.bits: name for name, quantizer in QUANTIZERS.items()}
IDENTITY = "identity"  # no basis at all: the quantizer works on the model's own channels
CODECS = (IDENTITY, *BASES)
if len(BITS) < len(QUANTIZERS):
    raise ImportError("two quantizers have the same `bits`, which presets tell them apart by")

__all__ = [
    "BASES",
    "BITS",
    "CODECS",
    "IDENTITY",
    "QUANTIZERS",
    "Basis",
    "Compressor",
    "IdentityCompressor",
    "Quantizer",
    "Transform",
    "codec_name",
    "needs_basis",
    "quantizer_for_bits",
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


def needs_basis(codec: str) -> bool:
    """Whether a codec has a basis to calibrate and a rank to cut."""
    return codec in BASES


def codec_name(name: str) -> str:
    """Check a codec's name. Raises PluginError with the nearest one for a name that isn't registered."""
    if name not in CODECS:
        near = difflib.get_close_matches(str(name), CODECS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise PluginError(f"unknown codec {name!r}{hint} (there are: {', '.join(CODECS)})")
    return name

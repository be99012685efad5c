"""No quantization: coordinates are stored as they come."""

from torch import Tensor

from gpt2.compression.codecs.base import Encoded, Quantizer
from gpt2.compression.codecs.formats import EXACT, Format


class Unquantized(Quantizer):
    """16 bits on a 16-bit model; the model's own dtype in any case."""

    name = "none"
    bits = 16
    by_bits = True
    lossless = True
    memory_format = Format(EXACT)

    def quantize(self, z: Tensor) -> Encoded:
        return {"z": z}

    def dequantize(self, encoded: Encoded, rank: int) -> Tensor:
        return encoded["z"]

"""No quantization: coordinates are stored as they come."""

from torch import Tensor

from gpt2.compression.codecs.base import Encoded, Quantizer


class Unquantized(Quantizer):
    """16 bits on a 16-bit model; the model's own dtype in any case."""

    name = "none"
    bits = 16
    lossless = True

    def quantize(self, z: Tensor) -> Encoded:
        return {"z": z}

    def dequantize(self, fields: Encoded, rank: int) -> Tensor:
        return fields["z"]

"""One Fisher basis for K and V of neighbouring heads together, of keys un-rotated block by block.

All keys of a block of 64 tokens are un-rotated by one position, that of the block's middle: y = R(−t₀) k. They still
differ by their places in the block, and so take somewhat more bits than keys without positions. In return a query can
be rotated instead, once per block, and attention reads codes as they are stored, K and V from the same ones:

    q · k̂  = (R(−t₀) q) · ŷ = (D_K R(−t₀) q) · ẑ + (R(−t₀) q) · mean        once per block of 64 tokens
    Σ p v̂  = D_Vᵀ (Σ p ẑ) + Σ p · mean                                      once per query, as with any basis

Channels without a position (partial rotary) are coded as `joint` codes them, and models without rotary positions need
no frame: all tokens share one absorbed query there.
"""

from gpt2.compression.codecs.formats import BLOCK
from gpt2.compression.codecs.multi_head import MultiHead


class Framed(MultiHead):
    """K and V of neighbouring heads together, keys un-rotated by the position of their block's middle."""

    name = "framed"
    preset_prefix = "kv"
    joint = True
    unrotated = True
    frame = BLOCK
    most_channels = 384  # every query head reads all channels that share a basis, so that wide ones cost time

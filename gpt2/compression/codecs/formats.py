"""How codes lie in memory: what codecs write, and what kernels read without asking a codec.

kind      fields, in this order, each [B, G, n, …] with n blocks of the codec's `block_tokens`
EXACT     vectors as the model made them, [B, H, T, d]
TOKEN     codes [B, G, T, bytes], then scale and offset [B, G, T, 1] float16 (`integer`)
CHANNEL   codes [B, G, n, bytes, r], then scale [B, G, n, 1, r] uint8 and offset [B, G, n, 1, r] float16 (`per_channel`)
PLANES    block [B, G, n, bytes] of bit planes with their metadata, then width indices [B, G, n, bytes] (`mixed`)
"""

from torch import Tensor

EXACT, TOKEN, CHANNEL, PLANES = range(4)  # as kernels/cpu.cpp numbers them
Packed = tuple[int, int, list[Tensor]]  # kind, bits of a code (0 where they differ), fields

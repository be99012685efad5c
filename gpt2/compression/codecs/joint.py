"""One Fisher basis for K and V of a layer together, of un-rotated keys.

K before its rotation and V are both linear in the same hidden state: their joint principal axes take about a bit per
channel less than those of single heads (KVTC un-rotates keys as well; MLA stores one latent for K and V by training).

The price is arithmetic: reconstruction is a w × w product per token, and keys must be rotated to their positions before
a query can read them. So it is for caches that are kept, in files or parked, more than for decoding.
"""

from gpt2.compression.codecs.multi_head import MultiHead


class Joint(MultiHead):
    """K and V of neighbouring heads together, keys without positions."""

    name = "joint"
    preset_prefix = "store"
    joint = True
    unrotated = True

"""How bytes are shared out between layers and channels, from what coding each of them was measured to cost.

Squared error in the coordinates of a multi-head basis is loss, so one price per byte is fair to all layers, to K and to
V: each gets the bytes that it would buy at the price at which the whole model meets its budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.formats import BLOCK, PLANE
from gpt2.compression.codecs.mixed import COSTS, width_bytes

PRICES = 64  # at which the demand of every basis is measured


@dataclass
class BitAllocation:
    """What coding the coordinates of N bases costs, G groups of w channels each.

    errors [N, G, w, widths]: mean squared error of a channel in a block at each of `formats.WIDTHS`. prices [P],
    demand [P, N]: bytes per block that a group of each basis buys at each price when every block chooses for itself.
    """

    errors: Tensor
    prices: Tensor
    demand: Tensor
    _widths: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def measured(cls, errors: Sequence[Tensor]) -> BitAllocation:
        """From the errors of sampled blocks: of every basis [G, n, w, widths], n blocks."""
        costs = torch.tensor(COSTS, dtype=torch.float32)
        highest = max(float(error.amax()) for error in errors)
        prices = torch.logspace(-12, math.log10(highest + 1e-30) + 1, PRICES)
        demand = [
            torch.stack([costs[(error + price * costs).argmin(-1)].sum(-1).mean() for error in errors])
            for price in prices
        ]
        return cls(torch.stack([error.mean(1) for error in errors]), prices, torch.stack(demand))

    @property
    def channels(self) -> int:
        return self.errors.shape[2]

    def bits_of_each(self, bits: float) -> list[float]:
        """Bits per coordinate of each basis, `bits` on average, of blocks that choose widths for themselves.

        Raises PluginError for more or fewer than the bases take.
        """
        w = self.channels
        wanted = bits * BLOCK * w / 8 - width_bytes(w)
        total = self.demand.double().mean(1)  # falls with the price
        if not float(total[-1]) <= wanted <= float(total[0]):
            low, high = self.bits_range()
            raise PluginError(f"bits {bits:g}: this codec takes {low:.2f} to {high:.2f} bits per coordinate")
        after = int((total > wanted).sum())
        before = max(after - 1, 0)
        gap = float(total[before] - total[after])
        share = (float(total[before]) - wanted) / gap if gap else 0.0
        spent = torch.lerp(self.demand[before].double(), self.demand[after].double(), share)
        planes = (spent / PLANE).floor() * PLANE
        # A little more than whole planes, or rounding could cost the last of them
        return [(float(p) + width_bytes(w)) * 8 / BLOCK / w + 1e-9 for p in planes]

    def bits_range(self) -> tuple[float, float]:
        """Least and most bits per coordinate, on average over the bases, that `bits_of_each` can share out."""
        w, total = self.channels, self.demand.double().mean(1)
        low, high = ((float(t) + width_bytes(w)) * 8 / BLOCK / w for t in (total[-1], total[0]))
        return low, high

    def widths(self, bits: float) -> Tensor:
        """Index into `formats.WIDTHS` of every channel, [N, G, w], the same in every block.

        Of least total error for codes and metadata of `bits` per coordinate on average. Computed once for each `bits`.
        """
        if bits not in self._widths:
            self._widths[bits] = self._cheapest_widths(bits)
        return self._widths[bits]

    def _cheapest_widths(self, bits: float) -> Tensor:
        """Lagrangian, by bisection on the logarithm of the price."""
        costs = torch.tensor(COSTS, dtype=torch.float64)
        budget = bits * BLOCK / 8 * self.errors[..., 0].numel()
        low, high = -60.0, 60.0
        for _ in range(100):
            middle = (low + high) / 2
            taken = costs[self._at_price(math.exp(middle))].sum(-1)  # [N, G]
            spent = float((taken.amax(1) * taken.shape[1]).sum())  # the groups of a basis lie in blocks of one length
            low, high = (low, middle) if spent <= budget else (middle, high)
        return self._at_price(math.exp(high))

    def _at_price(self, price: float) -> Tensor:
        return (self.errors.double() + price * torch.tensor(COSTS, dtype=torch.float64)).argmin(-1)

"""How bytes are shared out between layers and channels, from what coding each of them was measured to cost.

Squared error in the coordinates of a multi-head basis is loss, so one price per byte is fair to all layers, to K and to
V: each gets the bytes that it would buy at the price at which the whole model meets its budget.

A layer with a sliding window holds its bytes for fewer tokens than others, so they are cheaper by that share: its
weight. Bits are then meant on average over the numbers that are held at one context length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.formats import BLOCK, PLANE
from gpt2.compression.codecs.mixed import COSTS, width_bytes

PRICES = 64  # at which the demand of every basis is measured


@dataclass
class BitAllocation:
    """What coding the coordinates of N bases costs. Each has its own number of groups, G, and of their channels, w.

    errors: for every basis [G, w, widths], the mean squared error of a channel in a block at each of `formats.WIDTHS`;
    None for a place without a basis, of a layer that keeps no K and V. prices [P], demand [P, N]: bytes per block that
    a group of each basis buys at each price when every block chooses for itself. weights: of each basis, the tokens
    that it holds as a share of all tokens; None where all hold all.
    """

    errors: Sequence[Tensor | None]
    prices: Tensor
    demand: Tensor
    weights: tuple[float, ...] | None = None
    # Not copied by `replace`: they follow from the errors and weights
    _widths: dict[float, list[Tensor | None]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _weighted: dict[tuple[float, ...], BitAllocation] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def measured(cls, errors: Sequence[Tensor | None]) -> BitAllocation:
        """From the errors of sampled blocks: of every basis [G, n, w, widths], n blocks; None where there is none."""
        costs = torch.tensor(COSTS, dtype=torch.float32)
        highest = max(float(error.amax()) for error in errors if error is not None)
        prices = torch.logspace(-12, math.log10(highest + 1e-30) + 1, PRICES)

        def bought(error: Tensor | None, price: Tensor) -> Tensor:
            return torch.zeros(()) if error is None else costs[(error + price * costs).argmin(-1)].sum(-1).mean()

        demand = [torch.stack([bought(error, price) for error in errors]) for price in prices]
        return cls([None if error is None else error.mean(1) for error in errors], prices, torch.stack(demand))

    def weighted(self, weights: tuple[float, ...]) -> BitAllocation:
        """The same costs with weights of the bases, each above 0; itself where all are 1. Made once for each."""
        if all(weight == 1 for weight in weights):
            return self
        if weights not in self._weighted:
            self._weighted[weights] = replace(self, weights=weights)
        return self._weighted[weights]

    def bits_of_each(self, bits: float) -> list[float]:
        """Bits per coordinate of each basis, `bits` on average, of blocks that choose widths for themselves.

        0 for a place without a basis. Raises PluginError for more or fewer than the bases take.
        """
        demand = self.demand_at_one_price
        total = (demand * self._shares).mean(1)  # falls with the price
        wanted = bits * BLOCK * self._channels / 8 - self._index_bytes
        if not float(total[-1]) <= wanted <= float(total[0]):
            low, high = self.bits_range()
            raise PluginError(f"bits {bits:g}: this codec takes {low:.2f} to {high:.2f} bits per coordinate")
        after = int((total > wanted).sum())
        before = max(after - 1, 0)
        gap = float(total[before] - total[after])
        share = (float(total[before]) - wanted) / gap if gap else 0.0
        spent = torch.lerp(demand[before], demand[after], share)
        planes = iter((spent / PLANE).floor() * PLANE)
        bits_of_each = [0.0] * len(self.errors)
        for index in self._present:
            w = self.errors[index].shape[1]
            # A little more than whole planes, or rounding could cost the last of them
            bits_of_each[index] = (float(next(planes)) + width_bytes(w)) * 8 / BLOCK / w + 1e-9
        return bits_of_each

    def bits_range(self) -> tuple[float, float]:
        """Least and most bits per coordinate, on average over the bases, that `bits_of_each` can share out."""
        total = (self.demand_at_one_price * self._shares).mean(1)
        low, high = ((float(t) + self._index_bytes) * 8 / BLOCK / self._channels for t in (total[-1], total[0]))
        return low, high

    def widths(self, bits: float) -> list[Tensor | None]:
        """Index into `formats.WIDTHS` of every channel, [G, w] for each basis, the same in every block.

        Of least total error for codes and metadata of `bits` per coordinate on average. Computed once for each `bits`.
        """
        if bits not in self._widths:
            self._widths[bits] = self._cheapest_widths(bits)
        return self._widths[bits]

    def _cheapest_widths(self, bits: float) -> list[Tensor | None]:
        """Lagrangian, by bisection on the logarithm of the price."""
        costs = torch.tensor(COSTS, dtype=torch.float64)
        errors = [self.errors[index].double() for index in self._present]
        weights = [self._weight(index) for index in self._present]
        budget = sum(weight * error[..., 0].numel() for weight, error in zip(weights, errors, strict=True))
        budget = bits * BLOCK / 8 * budget

        def at(price: float) -> list[Tensor]:
            return [(e + price * weight * costs).argmin(-1) for e, weight in zip(errors, weights, strict=True)]

        low, high = -60.0, 60.0
        for _ in range(100):
            middle = (low + high) / 2
            taken = [costs[chosen].sum(-1) for chosen in at(math.exp(middle))]  # [G]
            # The groups of a basis lie in blocks of one length
            spent = sum(weight * float(t.amax() * len(t)) for weight, t in zip(weights, taken, strict=True))
            low, high = (low, middle) if spent <= budget else (middle, high)
        found: list[Tensor | None] = [None] * len(self.errors)
        for index, chosen in zip(self._present, at(math.exp(high)), strict=True):
            found[index] = chosen
        return found

    @cached_property
    def demand_at_one_price(self) -> Tensor:
        """Bytes per block that a group of each basis there is buys at `prices` of a byte held for all tokens, float64.

        A basis of less weight pays that share of the price: its demand is read off between two measured prices.
        """
        demand = self.demand.double()[:, self._present]
        if self.weights is None:
            return demand
        columns = []
        for place, index in enumerate(self._present):
            own = self.prices.double() * self._weight(index)
            after = torch.searchsorted(self.prices.double(), own).clamp(1, len(own) - 1)
            low, high = self.prices.double()[after - 1], self.prices.double()[after]
            share = ((own.log() - low.log()) / (high.log() - low.log())).nan_to_num(0).clamp(0, 1)
            columns.append(torch.lerp(demand[after - 1, place], demand[after, place], share))
        return torch.stack(columns, dim=1)

    @cached_property
    def _present(self) -> list[int]:
        """Places with a basis."""
        return [index for index, error in enumerate(self.errors) if error is not None]

    def _weight(self, index: int) -> float:
        return 1.0 if self.weights is None else self.weights[index]

    @cached_property
    def _shares(self) -> Tensor:
        """Blocks that each basis holds, one for each of its groups, relative to their mean; 1 where all are alike."""
        blocks = torch.tensor([len(self.errors[i]) * self._weight(i) for i in self._present], dtype=torch.float64)
        return blocks / blocks.mean()

    @cached_property
    def _channels(self) -> float:
        """Channels of a group, on average over the blocks that are held."""
        widths = torch.tensor([self.errors[i].shape[1] for i in self._present], dtype=torch.float64)
        return float((self._shares * widths).mean())

    @cached_property
    def _index_bytes(self) -> float:
        """Bytes of a block's widths, on average over the blocks that are held."""
        held = torch.tensor([width_bytes(self.errors[i].shape[1]) for i in self._present], dtype=torch.float64)
        return float((self._shares * held).mean())

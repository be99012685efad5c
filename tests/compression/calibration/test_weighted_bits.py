"""Bytes shared out between bases of different sizes, some of which are held for fewer tokens than others."""

import pytest
import torch
from sampling import covering

from gpt2.compression.calibration.bit_allocation import BitAllocation
from gpt2.compression.codecs.formats import BLOCK, PLANE, WIDTHS
from gpt2.compression.codecs.mixed import COSTS


def allocation(weights: tuple[float, ...] | None = None) -> BitAllocation:
    """Three bases and a place without one; two of them alike, the third of another size."""
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(2, 40, 48, 1, generator=generator) * 0.3 ** torch.arange(len(WIDTHS))
    other = torch.rand(1, 40, 96, 1, generator=generator) * 0.3 ** torch.arange(len(WIDTHS))
    found = BitAllocation.measured([one, None, one.clone(), other])
    return found if weights is None else found.weighted(weights)


def sizes_of(found: BitAllocation) -> list[tuple[int, int]]:
    return [(0, 0) if errors is None else errors.shape[:2] for errors in found.errors]


@pytest.mark.parametrize(
    ("weights", "bits"), covering([None, (1.0, 1.0, 0.125, 1.0), (0.5, 1.0, 0.02, 1.0)], [1.5, 3.0, 5.0], times=2)
)
def test_bits_are_meant_on_average_over_what_is_held(weights, bits):
    found = allocation(weights)
    each, sizes, weights = found.bits_of_each(bits), sizes_of(found), weights or (1.0,) * 4
    assert each[1] == 0
    held = [weight * groups * w for weight, (groups, w) in zip(weights, sizes, strict=True)]
    average = sum(own * b for own, b in zip(held, each, strict=True)) / sum(held)
    assert bits - 8 * PLANE / BLOCK / 48 < average <= bits + 1e-6
    if weights[2] < weights[0]:
        assert each[2] > each[0], "the same costs, held for fewer tokens"
    widths = found.widths(bits)
    spent = sum(
        weight * float(torch.tensor(COSTS)[own].sum(-1).amax() * len(own))
        for weight, own in zip(weights, widths, strict=True)
        if own is not None
    )
    budget = bits * BLOCK / 8 * sum(held)
    assert 0.97 * budget < spent <= budget
    low, high = found.bits_range()
    assert low < bits < high


def test_weights_of_one_change_nothing():
    found = allocation()
    assert found.weighted((1.0,) * 4) is found
    assert found.weighted((1.0, 1.0, 0.5, 1.0)) is found.weighted((1.0, 1.0, 0.5, 1.0))


def test_a_basis_of_less_weight_pays_that_share_of_the_price():
    """Demand at a price is read off between measured ones: with weights on the grid of prices it is exact."""
    found = allocation()
    step = float(found.prices[1] / found.prices[0])
    weighted = found.weighted((1.0, 1.0, 1 / step**4, 1.0))
    before, after = found._demand_at_one_price, weighted._demand_at_one_price
    torch.testing.assert_close(after[4:, 1], before[:-4, 1], rtol=1e-3, atol=1e-3)
    assert torch.equal(after[:, 0], before[:, 0])

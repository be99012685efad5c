"""Mixed widths: what is decoded is what the search chose, no block is over its bytes, and none could do better."""

import pytest
import torch
from multi_head import PRICES, least
from sampling import covering, sampled
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs import QUANTIZERS, mixed
from gpt2.compression.codecs.mixed import BLOCK, COSTS, PLANE, WIDTHS, Mixed, MixedFixed, errors


def coordinates(r: int, batch: int = 2, groups: int = 2, blocks: int = 3, seed: int = 0) -> Tensor:
    """Coordinates as a basis gives them, [B, G, blocks · 64, r]: falling variance, other in every block."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, groups, blocks, BLOCK, r, generator=generator)
    uneven = torch.randn(batch, groups, blocks, 1, r, generator=generator).exp()
    return (z * uneven * torch.logspace(1, -2, r)).flatten(2, 3)


def outliers(z: Tensor) -> Tensor:
    return z * torch.where(torch.arange(z.shape[2]) == 5, 300, 1)[:, None]


CASES = {
    "plain": lambda z: z,
    "zeros": torch.zeros_like,
    "every other channel zero": lambda z: z * (torch.arange(z.shape[3]) % 2),
    "constant": lambda z: torch.full_like(z, 0.731),
    "constant beyond the scales": lambda z: torch.full_like(z, -6e5),
    "far from zero": lambda z: z + 400,
    "far below zero": lambda z: z - 400,
    "one-sided": lambda z: z.abs(),
    "outliers": outliers,
    "huge": lambda z: z * 1e4,
    "tiny": lambda z: z * 1e-5,
    "below the smallest scale": lambda z: z * 1e-12,
    "two values": lambda z: z.sign(),
}


def in_blocks(x: Tensor) -> Tensor:
    """[B, G, T, r] → [B, G, n, 64, r]."""
    return x.unflatten(2, (-1, BLOCK))


def lost(z: Tensor, back: Tensor) -> Tensor:
    """Squared error of every block and channel, [B, G, n, r]."""
    return in_blocks((back.double() - z.double()).square()).sum(3)


def searched(z: Tensor, choice: Tensor, far: bool = True) -> Tensor:
    """The error that the search counts with, for the widths it chose."""
    return errors(z, far).gather(-1, choice[..., None])[..., 0].double()


# --- what comes back


@pytest.mark.parametrize(
    ("case", "r", "bits"),
    [*sampled(covering(CASES, [1, 2, 7, 8, 48, 100], [0.25, 1, 2.75, 4, 10.5], times=2), 15), ("plain", 383, 3)],
)  # the last as of a real basis: an odd number, beyond what fits a byte
def test_decoding_loses_exactly_what_the_search_found_in_the_bytes_of_its_bits(case, r, bits):
    """Codes, planes, order and metadata: an error in any would show, since each channel loses another amount."""
    z, quantizer = CASES[case](coordinates(r)), Mixed(bits)
    encoded = quantizer.quantize(z)
    back, chosen = quantizer.dequantize(encoded, r), mixed.unpack_indices(encoded["widths"], r)
    assert back.shape == z.shape and torch.isfinite(back).all()
    rounding = 1e-9 * in_blocks(z.double()).square().sum(3)
    assert ((lost(z, back) - searched(z, chosen)).abs() <= rounding + 1e-3 * lost(z, back) + 1e-30).all()
    assert r < 383 or len(chosen.unique()) == len(WIDTHS), "every width is used"
    packed = mixed.pack_indices(chosen)
    assert packed.shape[-1] == mixed.width_bytes(r) == 3 * -(-r // 8) and torch.equal(packed, encoded["widths"])
    assert all(part.shape[:3] == (2, 2, 3) for part in encoded.values())
    budget, stored = bits * BLOCK * r / 8, sum(part[0, 0, 0].nbytes for part in encoded.values())
    assert stored == encoded["block"].shape[-1] + mixed.width_bytes(r)
    if budget >= mixed.width_bytes(r) + PLANE:  # below that there is one plane, which no channel has
        assert budget - PLANE < stored <= budget
    assert (PRICES[chosen].sum(-1) <= encoded["block"].shape[-1]).all(), "no block is over its budget"


def test_coordinates_of_16_bits_and_beyond_all_scales():
    for dtype in (torch.float16, torch.bfloat16):
        z = coordinates(9).to(dtype)
        encoded, same = Mixed(5).quantize(z), Mixed(5).quantize(z.float())
        assert all(part.dtype == torch.uint8 and torch.equal(part, same[name]) for name, part in encoded.items())
    for value in (1e15, -1e15, 3e18):
        z = coordinates(6)
        z[0, 0, 3, 2] = value
        assert torch.isfinite(Mixed(6).dequantize(Mixed(6).quantize(z), 6)).all()


@pytest.mark.parametrize("middle", [0.0, 0.3, -0.3, 1.0, -1.0, 3.7, 77.0, -77.0, 3000.0])
def test_no_grid_is_off_by_more_than_its_step(middle):
    """Wherever a channel lies: the offset's byte reaches it, at the price of a wider step."""
    noise = coordinates(400, batch=1, groups=1)
    noise = noise / noise.abs().amax((0, 1, 2)) * torch.linspace(0.05, 1, 400)
    y = mixed.in_blocks(noise + middle)
    size = y.amax(-1) - y.amin(-1)
    for bits, (error, scale, _) in zip(WIDTHS[1:], mixed.grids(y)[1:], strict=True):
        unit = float(mixed.offset_unit(torch.tensor(bits)))
        step = torch.maximum(1.06 * size / (2**bits - 1), y.mean(-1).abs().add(size) / (120 * unit)) * 2 ** (1 / 16)
        step = step.clamp_min(2**-17)  # there is none below
        assert (scale <= step * 1.001).all()
        # Half a step for the code, an eighth for an offset that is rounded
        assert (error / BLOCK <= (0.63 * step) ** 2).all(), bits


def test_narrow_codes_cut_extremes_off():
    """Two bits for a Gaussian: a grid that reached the extremes would lose a third more."""
    z = coordinates(1, blocks=200)
    two = errors(z)[..., WIDTHS.index(2)] / in_blocks(z).square().sum(3)
    whole, _, _ = mixed.best_grid(mixed.in_blocks(z), 2, (1.0,))
    assert two.mean() < 0.15 < (whole / in_blocks(z).square().sum(3)).mean()


# --- the container


def test_the_container_is_as_documented():
    """Decoded by hand, from the module's docstring; some channels are far from zero."""
    r, quantizer = 11, Mixed(3.5)
    z = coordinates(r) + 400 * torch.tensor([0, 1, -1, 0, 0, 0, 0.5, 0, 0, -1, 0])
    encoded = quantizer.quantize(z)
    back = in_blocks(quantizer.dequantize(encoded, r))
    for b, g, n in [(0, 0, 0), (1, 0, 2), (1, 1, 1)]:
        block, packed = encoded["block"][b, g, n].tolist(), encoded["widths"][b, g, n].tolist()
        index = [
            sum((packed[plane * -(-r // 8) + c // 8] >> c % 8 & 1) << plane for plane in range(3)) for c in range(r)
        ]
        widths = [WIDTHS[i] for i in index]
        order = sorted(range(r), key=lambda c: -widths[c])
        place, metadata = 0, sum(widths) * PLANE
        coded = [channel for channel in order if widths[channel]]
        behind = metadata + mixed.METADATA * len(coded)
        far = {}
        for channel in sorted(c for i, c in enumerate(coded) if not block[metadata + mixed.METADATA * i + 1]):
            far[channel] = int.from_bytes(bytes(block[behind : behind + mixed.FAR]), "little", signed=True)
            behind += mixed.FAR
        assert {6, 9} & set(coded) <= set(far) <= {1, 2, 6, 9}
        for channel in order:
            bits, expected = widths[channel], [0.0] * BLOCK
            if bits:
                planes = [block[place + PLANE * j : place + PLANE * (j + 1)] for j in range(bits)]
                place += PLANE * bits
                codes = [sum((planes[j][t // 8] >> t % 8 & 1) << j for j in range(bits)) for t in range(BLOCK)]
                scale, offset = 2 ** (block[metadata] / 8 - 17), far.get(channel, block[metadata + 1] - 128)
                metadata += mixed.METADATA
                middle = offset * max(2**bits / 64, 1 / 4)
                expected = [scale * (code - (2**bits - 1) / 2 + middle) for code in codes]
            torch.testing.assert_close(back[b, g, n, :, channel], torch.tensor(expected), rtol=1e-5, atol=1e-5)
        assert not any(block[behind:]), "what is left over is zero"


def test_fixed_widths_are_the_same_container_without_the_widths():
    """Groups of different sizes lie in blocks of one length."""
    z = coordinates(13, batch=1, groups=1, blocks=1)
    free = Mixed(4).quantize(z)
    fixed = MixedFixed(4, mixed.unpack_indices(free["widths"], 13)[0, :, 0])
    encoded = fixed.quantize(z)
    assert set(encoded) == {"block"}
    assert torch.equal(encoded["block"], free["block"][..., : encoded["block"].shape[-1]])
    assert torch.equal(fixed.dequantize(encoded, 13), Mixed(4).dequantize(free, 13))
    z, widths = coordinates(10), torch.randint(len(WIDTHS), (2, 10), generator=torch.Generator().manual_seed(0))
    fixed = MixedFixed(4, widths)
    encoded = fixed.quantize(z)
    assert encoded["block"].shape == (2, 2, 3, int(PRICES[widths].sum(-1).max()))
    expected = searched(z, widths[None, :, None].expand(2, 2, 3, 10), far=False)
    torch.testing.assert_close(lost(z, fixed.dequantize(encoded, 10)), expected, rtol=1e-3, atol=1e-6)
    unknown, message = QUANTIZERS["mixed_fixed"].at(3), "takes its widths from the calibration of a multi-head basis"
    for call in (lambda: unknown.quantize(z), lambda: unknown.dequantize(encoded, 10)):
        with pytest.raises(PluginError, match=f"mixed_fixed {message}"):
            call()


@pytest.mark.parametrize("fixed", [False, True])
def test_many_blocks_are_read_in_parts(fixed, monkeypatch):
    z, widths = (
        coordinates(10, blocks=5),
        torch.randint(len(WIDTHS), (2, 10), generator=torch.Generator().manual_seed(0)),
    )
    quantizer = MixedFixed(4, widths) if fixed else Mixed(4)
    encoded = quantizer.quantize(z)
    whole, read = quantizer.dequantize(encoded, 10), []
    unpack = mixed._unpack
    monkeypatch.setattr(mixed, "READ_AT_ONCE", 2 * len(z) * 2 * BLOCK * 10)
    monkeypatch.setattr(mixed, "_unpack", lambda block, bits: read.append(block.shape[2]) or unpack(block, bits))
    torch.testing.assert_close(quantizer.dequantize(encoded, 10), whole)  # powers of two are rounded by their place
    assert read == [2, 2, 1]


# --- what is chosen


@pytest.mark.parametrize(("bits", "r"), covering([1, 2.2, 4, 7], [20, 6, 2, 1], times=2))
def test_no_other_widths_lose_less_in_the_same_bytes(r, bits):
    error, budget = errors(coordinates(r, blocks=4, seed=r)), int(bits * 8 * r)
    choice = mixed.cheapest(error, budget)
    total, spent = error.double().gather(-1, choice[..., None]).sum((-1, -2)), PRICES[choice].sum(-1)
    assert (spent <= budget).all()
    for own, found, size in zip(error.flatten(0, 2), total.flatten(), spent.flatten(), strict=True):
        assert found <= least(own, int(size)) * (1 + 1e-5) + 1e-9
    if r == 20:  # among so many channels what can't be spent is small
        best = [least(own, budget) for own in error.flatten(0, 2)]
        assert total.sum() <= 1.1 * sum(best)
        assert (budget - spent < max(COSTS)).all(), "less than one channel's widest step is left"


def test_nothing_and_everything_fit():
    error = errors(coordinates(8))
    assert not mixed.cheapest(error, COSTS[1] - 1).any(), "less than one channel of the narrowest codes"
    assert not mixed.cheapest(torch.zeros_like(error), 400).any(), "nothing to gain"
    assert (mixed.cheapest(error, 8 * max(COSTS)) == error.argmin(-1)).float().mean() > 0.99


@pytest.mark.parametrize("name", ["mixed", "mixed_fixed"])
def test_any_bits_within_the_limits(name):
    quantizer = QUANTIZERS[name]
    for bits in (0.25, 1, 3.3, 10.5):
        other = quantizer.at(bits)
        assert (type(other), other.bits) == (type(quantizer), bits) and quantizer.bits == 4
    for bits in (0.2, 10.6, 0, -1, float("inf"), float("nan")):
        with pytest.raises(PluginError, match=f"bits {bits}: quantizer {name} takes 0.25 to 10.5 bits"):
            quantizer.at(bits)

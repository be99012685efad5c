"""KIVI and TurboQuant as their papers describe them: packing, groups, rotation, distortion, bytes, generation."""

from functools import partial

import pytest
import torch
from tiny import tiny_loaded, windows

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import cache_bytes
from gpt2.evaluation import kivi, other_caches, turboquant

H, D, T = 2, 64, 300
DISTORTION = {1: 0.36, 2: 0.117, 3: 0.034, 4: 0.0095}  # of unit vectors, as the paper gives them for many channels
CACHES = {"KIVI": kivi.kivi_cache, "TurboQuant": turboquant.turboquant_cache}
every_number_of_bits = pytest.mark.parametrize("bits", [4, 3, 2])


def read(side, x):
    side.append(x)
    return side.read()


@every_number_of_bits
def test_codes_survive_packing_and_leave_no_bit_unused(bits):
    codes = torch.randint(2**bits, (3, 5, 32), generator=torch.Generator().manual_seed(bits))
    packed = kivi.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, 32 * bits // 8)
    assert torch.equal(kivi.unpack(packed, bits), codes)
    # Eight codes of 3 bits, lowest first, are one number of 24 bits in three bytes
    codes = [5, 0, 7, 1, 2, 6, 3, 4]
    number = sum(code << 3 * place for place, code in enumerate(codes))
    assert kivi.pack(torch.tensor(codes), 3).tolist() == list(number.to_bytes(3, "little"))


@every_number_of_bits
def test_kivis_error_is_half_a_step_of_the_own_group(bits, x):
    groups = x.unflatten(-1, (-1, 32)) * torch.logspace(-3, 3, T)[:, None, None] + 0.5
    stored = kivi.quantize(groups, bits)
    error = (kivi.dequantize(stored, bits) - groups).abs()
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    rounding = 2**-10 * torch.maximum(low.abs(), high.abs()) + 1e-4  # scale and zero are float16
    assert (error <= step / 2 + rounding).all()
    assert (error > step / 4).float().mean() > 0.2, "such an error is expected of so few bits"
    assert stored["scale"].dtype == stored["zero"].dtype == torch.float16
    constant = torch.full((2, 32), 3.25)
    assert torch.equal(kivi.dequantize(kivi.quantize(constant, bits), bits), constant)


def test_keys_are_quantized_per_channel_and_values_per_token(x):
    """What is loud spoils its own group and no other: that of its channel for K, of its token for V."""
    channel, token = x.clone(), x.clone()
    channel[..., 7] *= 1000
    token[:, :, 70] *= 1000
    k, v = (partial(kivi.KiviSide, 4, 0, block) for block in (32, 1))
    loud = {True: channel, False: token}
    errors = {(side, own): (read(side(), data) - data).abs() for side in (k, v) for own, data in loud.items()}
    for own, is_channel, beside in ((k, True, (..., slice(8, 32))), (v, False, (..., slice(64, 70), slice(None)))):
        assert errors[own, is_channel][beside].max() < 0.5
        assert errors[v if own is k else k, is_channel][beside].median() > 0.5
    assert errors[v, True][..., 32:].max() < 0.5 and errors[k, False][:, :, 96:].max() < 0.5


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("kind", ["KIVI's K", "KIVI's V", "TurboQuant"])
def test_what_is_read_is_what_is_stored_whatever_the_chunks(x, kind, sinks):
    """All but the sinks is coded, and of KIVI's keys but for their unfinished group."""
    make = {"KIVI's K": lambda: kivi.KiviSide(2, sinks, 32), "KIVI's V": lambda: kivi.KiviSide(2, sinks, 1),
            "TurboQuant": lambda: turboquant.TurboSide(3, sinks)}[kind]  # fmt: skip
    side, rest = make(), (T - sinks) % 32 if kind == "KIVI's K" else 0
    for chunk in x.split(50, dim=2):
        side.append(chunk)
    found = side.read()
    assert torch.equal(read(make(), x), found) and len(side) == T
    exact = (found == x).flatten(3).all(-1)[0, 0]
    assert exact[:sinks].all() and exact[T - rest :].all() and not exact[sinks : T - rest].any()


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize(("bits", "sinks"), [(4, 0), (3, 4), (2, 4)])
def test_a_cache_holds_what_a_hand_counts(x, name, bits, sinks):
    cache = CACHES[name](2, bits, sinks)
    for chunk in x.bfloat16().split(64, dim=2):
        for index in range(2):
            cache.update(chunk, chunk, index)
    exact, coded = sinks * D * 2, T - sinks
    group = 32 * bits // 8 + 2 + 2  # codes, scale, zero point
    keys = D * (coded // 32 * group + coded % 32 * 2) + exact
    sides = {"KIVI": keys + coded * D // 32 * group + exact,
             "TurboQuant": 2 * (coded * (D * bits // 8 + 2) + exact)}  # codes and a norm in 16 bits  # fmt: skip
    assert cache_bytes(cache) == 2 * H * sides[name]


def test_the_codebook_is_that_of_a_coordinate_on_the_sphere():
    """In many dimensions it is the Gaussian's, whose values the paper gives; every value is its cell's mean."""
    for bits, values, near in ((2, [-1.51, -0.453, 0.453, 1.51], 3e-3), (1, [-0.798, 0.798], 2e-3)):
        scaled = turboquant.codebook(1024, bits) * 1024**0.5
        torch.testing.assert_close(scaled, torch.tensor(values), atol=near, rtol=0)
    points = torch.nn.functional.normalize(torch.randn(200_000, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    values, x = turboquant.codebook(8, 3), points[:, 0]
    nearest = (x[:, None] - values).abs().argmin(-1)
    means = torch.stack([x[nearest == cell].mean() for cell in range(8)])
    torch.testing.assert_close(values, means, atol=0.01, rtol=0)
    turn = turboquant.rotation(D)  # keeps lengths, and spreads one channel over all
    torch.testing.assert_close(turn @ turn.mT, torch.eye(D), atol=1e-5, rtol=0)
    assert turn.abs().max() < 0.6 and turn is turboquant.rotation(D)


@pytest.mark.parametrize("bits", DISTORTION)
def test_turboquants_distortion_is_the_papers_whatever_the_vectors_are(bits, x):
    loud = x.clone()
    loud[..., 7] *= 1000  # all vectors nearly have one direction, so the mean is over the coordinates of one vector
    for data, near in ((x, 0.1), (loud, 0.35), (x * torch.logspace(-2, 2, T)[:, None], 0.1)):
        error = (read(turboquant.TurboSide(bits, 0), data) - data).square().sum(-1) / data.square().sum(-1)
        assert float(error.mean()) == pytest.approx(DISTORTION[bits], rel=near)
    zero = torch.zeros(1, 1, 2, D)
    assert torch.equal(read(turboquant.TurboSide(bits, 0), zero), zero)


def test_generation_runs_through_both_and_they_are_among_the_peers():
    llama = tiny_loaded("llama", hidden_size=64)  # head_dim 16: packing by 8 fits
    made = dict(other_caches.factories("turboquant", llama))
    assert list(made)[:2] == ["TurboQuant 4 bits", "TurboQuant 4 bits, no exact sinks"] and len(made) == 6
    for cache in (made["TurboQuant 4 bits, no exact sinks"](), kivi.kivi_cache(3, 4, 0)):
        tokens = llama.model.generate(windows(2, 70), past_key_values=cache, do_sample=False, max_new_tokens=4)
        assert tokens.shape == (2, 74) and cache.get_seq_length() == 73
    for make in CACHES.values():
        with pytest.raises(PluginError, match="head_dim 12 isn't a multiple of 8"):
            make(1, 4).update(torch.randn(1, 1, 40, 12), torch.randn(1, 1, 40, 12), 0)

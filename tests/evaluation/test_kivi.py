"""KIVI as the paper describes it: packing, groups of K and of V, bytes, generation."""

from functools import partial

import pytest
import torch
from tiny import tiny_loaded, windows

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import cache_bytes
from gpt2.evaluation import kivi

BITS = (4, 3, 2)
H, D, T = 2, 64, 300


@pytest.fixture(scope="module")
def x():
    return torch.randn(1, H, T, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", BITS)
def test_codes_survive_packing_and_leave_no_bit_unused(bits):
    codes = torch.randint(2**bits, (3, 5, 32), generator=torch.Generator().manual_seed(bits))
    packed = kivi.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, 32 * bits // 8)
    assert torch.equal(kivi.unpack(packed, bits), codes)
    # Eight codes of 3 bits, lowest first, are one number of 24 bits in three bytes
    codes = [5, 0, 7, 1, 2, 6, 3, 4]
    number = sum(code << 3 * place for place, code in enumerate(codes))
    assert kivi.pack(torch.tensor(codes), 3).tolist() == list(number.to_bytes(3, "little"))


@pytest.mark.parametrize("bits", BITS)
def test_error_is_half_a_step_of_the_own_group(bits, x):
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
    for make, data, beside in ((k, channel, (..., slice(8, 32))), (v, token, (..., slice(64, 70), slice(None)))):
        assert error_of(make(), data)[beside].max() < 0.5
        other = v if make is k else k
        assert error_of(other(), data)[beside].median() > 0.5
    assert error_of(v(), channel)[..., 32:].max() < 0.5 and error_of(k(), token)[:, :, 96:].max() < 0.5


def error_of(side: kivi.KiviSide, x):
    side.append(x)
    return (side.read() - x).abs()


@pytest.mark.parametrize("sinks", [0, 4])
def test_what_is_read_is_what_is_stored(x, sinks):
    """The new chunk too, K but for its unfinished group; and the stored doesn't depend on the chunks."""
    side = {name: kivi.KiviSide(2, sinks, block) for name, block in (("k", 32), ("v", 1))}
    for chunk in x.split(50, dim=2):
        for one in side.values():
            one.append(chunk)
    for name, one in side.items():
        read, rest = one.read(), (T - sinks) % 32 if name == "k" else 0
        exact = (read == x).flatten(3).all(-1)[0, 0]
        assert exact[:sinks].all() and exact[T - rest :].all() and len(one) == T
        assert not exact[sinks : T - rest].any()
        whole = kivi.KiviSide(2, sinks, one.block)
        whole.append(x)
        assert torch.equal(whole.read(), read)


@pytest.mark.parametrize(("bits", "sinks"), [(4, 0), (3, 4), (2, 4)])
def test_kivi_holds_what_a_hand_counts(x, bits, sinks):
    cache = kivi.kivi_cache(2, bits, sinks)
    for chunk in x.bfloat16().split(64, dim=2):
        for index in range(2):
            cache.update(chunk, chunk, index)
    group = 32 * bits // 8 + 2 + 2  # codes, scale, zero point
    groups = (T - sinks) // 32
    keys = H * D * (groups * group + (T - 32 * groups) * 2)
    values = H * ((T - sinks) * D // 32 * group + sinks * D * 2)
    assert cache_bytes(cache) == 2 * (keys + values)


def test_generation_runs_through_kivi():
    llama, cache = tiny_loaded("llama", hidden_size=64), kivi.kivi_cache(3, 4, 0)  # head_dim 16: packing by 8 fits
    tokens = llama.model.generate(windows(2, 70), past_key_values=cache, do_sample=False, max_new_tokens=4)
    assert tokens.shape == (2, 74) and cache.get_seq_length() == 73
    with pytest.raises(PluginError, match="head_dim 12 isn't a multiple of 8"):
        kivi.kivi_cache(1, 4).update(torch.randn(1, 1, 40, 12), torch.randn(1, 1, 40, 12), 0)

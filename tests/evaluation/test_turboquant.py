"""TurboQuant as the paper describes it: rotation, codebook, distortion, bytes, generation."""

import pytest
import torch
from tiny import tiny_loaded, windows

from gpt2.common.errors import PluginError
from gpt2.compression.cache.size import cache_bytes
from gpt2.evaluation import other_caches, turboquant

H, D, T = 2, 64, 300
DISTORTION = {1: 0.36, 2: 0.117, 3: 0.034, 4: 0.0095}  # of unit vectors, as the paper gives them for many channels


@pytest.fixture(scope="module")
def x():
    return torch.randn(1, H, T, D, generator=torch.Generator().manual_seed(0))


def test_the_codebook_is_that_of_a_coordinate_on_the_sphere():
    """In many dimensions it is the Gaussian's, whose values the paper gives; every value is its cell's mean."""
    scaled = turboquant.codebook(1024, 2) * 1024**0.5
    torch.testing.assert_close(scaled, torch.tensor([-1.51, -0.453, 0.453, 1.51]), atol=3e-3, rtol=0)
    torch.testing.assert_close(
        turboquant.codebook(1024, 1) * 1024**0.5, torch.tensor([-0.798, 0.798]), atol=2e-3, rtol=0
    )
    points = torch.nn.functional.normalize(torch.randn(200_000, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    values, x = turboquant.codebook(8, 3), points[:, 0]
    nearest = (x[:, None] - values).abs().argmin(-1)
    means = torch.stack([x[nearest == cell].mean() for cell in range(8)])
    torch.testing.assert_close(values, means, atol=0.01, rtol=0)


def test_the_rotation_keeps_lengths_and_spreads_one_channel_over_all():
    turn = turboquant.rotation(D)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(D), atol=1e-5, rtol=0)
    assert turn.abs().max() < 0.6 and turn is turboquant.rotation(D)


@pytest.mark.parametrize("bits", DISTORTION)
def test_distortion_is_the_papers_whatever_the_vectors_are(bits, x):
    loud = x.clone()
    loud[..., 7] *= 1000  # all vectors nearly have one direction, so the mean is over the coordinates of one vector
    for data, near in ((x, 0.1), (loud, 0.35), (x * torch.logspace(-2, 2, T)[:, None], 0.1)):
        side = turboquant.TurboSide(bits, 0)
        side.append(data)
        error = (side.read() - data).square().sum(-1) / data.square().sum(-1)
        assert float(error.mean()) == pytest.approx(DISTORTION[bits], rel=near)
    zero = turboquant.TurboSide(bits, 0)
    zero.append(torch.zeros(1, 1, 2, D))
    assert torch.equal(zero.read(), torch.zeros(1, 1, 2, D))


@pytest.mark.parametrize("sinks", [0, 4])
def test_what_is_read_is_what_is_stored(x, sinks):
    whole, side = turboquant.TurboSide(3, sinks), turboquant.TurboSide(3, sinks)
    whole.append(x)
    for chunk in x.split(50, dim=2):
        side.append(chunk)
    assert torch.equal(whole.read(), side.read()) and len(side) == T
    exact = (side.read() == x).flatten(3).all(-1)[0, 0]
    assert exact[:sinks].all() and not exact[sinks:].any()


@pytest.mark.parametrize(("bits", "sinks"), [(4, 0), (3, 4), (2, 4)])
def test_it_holds_what_a_hand_counts(x, bits, sinks):
    cache = turboquant.turboquant_cache(2, bits, sinks)
    for chunk in x.bfloat16().split(64, dim=2):
        for index in range(2):
            cache.update(chunk, chunk, index)
    one = H * ((T - sinks) * (D * bits // 8 + 2) + sinks * D * 2)  # codes and a norm in 16 bits
    assert cache_bytes(cache) == 2 * 2 * one


def test_generation_runs_through_it_and_it_is_among_the_peers():
    llama = tiny_loaded("llama", hidden_size=64)  # head_dim 16: packing by 8 fits
    made = dict(other_caches.factories("turboquant", llama))
    assert list(made)[:2] == ["TurboQuant 4 bits", "TurboQuant 4 bits, no exact sinks"] and len(made) == 6
    cache = made["TurboQuant 4 bits, no exact sinks"]()
    tokens = llama.model.generate(windows(2, 70), past_key_values=cache, do_sample=False, max_new_tokens=4)
    assert tokens.shape == (2, 74) and cache.get_seq_length() == 73
    with pytest.raises(PluginError, match="head_dim 12 isn't a multiple of 8"):
        turboquant.turboquant_cache(1, 4).update(torch.randn(1, 1, 40, 12), torch.randn(1, 1, 40, 12), 0)

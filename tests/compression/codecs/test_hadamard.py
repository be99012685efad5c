"""The rotation of `hadamard`: orthonormal at any width, and a channel is spread over all of them."""

import pytest
import torch

from gpt2.compression.codecs import QUANTIZERS, Compressor, full_rank, needs_calibration
from gpt2.compression.codecs.hadamard import Hadamard


@pytest.mark.parametrize("d", [1, 2, 7, 12, 16, 20, 32, 40, 48, 64, 80, 96, 112, 120, 128, 160, 192, 256])
def test_the_rotation_is_orthonormal_and_takes_no_mean_off(d):
    transform = Hadamard().transform(d)
    assert transform.E.shape == transform.D.shape == (1, d, d) and full_rank("hadamard", d) == d
    assert torch.allclose(transform.E[0].T @ transform.E[0], torch.eye(d, dtype=torch.float64), atol=1e-12)
    assert torch.equal(transform.D[0], transform.E[0].T) and not transform.mean.any()
    assert not needs_calibration("hadamard")


@pytest.mark.parametrize(("d", "power"), [(64, 64), (128, 128), (80, 16), (96, 32), (12, 4), (45, 1)])
def test_a_channel_is_spread_over_all_its_power_of_two(d, power):
    """Evenly over the Hadamard factor; over the rest, as a cosine basis spreads."""
    energy = Hadamard().transform(d).E[0].square().view(power, d // power, power, d // power).sum((1, 3)) * power
    assert torch.allclose(energy / (d // power), torch.ones(power, power, dtype=torch.float64))


def test_it_lowers_the_error_of_one_large_channel():
    """Quantized by token, a channel of a hundred times the others sets their step; rotated it is shared by all."""
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 100
    rotation = Hadamard().transform(64).to("cpu", torch.float32)
    plain, rotated = Compressor(QUANTIZERS["int4"]), Compressor(QUANTIZERS["int4"], rotation)
    error = [(c.reconstruct(c.compress(x), 64, x.dtype) - x).square().mean().item() for c in (plain, rotated)]
    assert error[1] < 0.6 * error[0]

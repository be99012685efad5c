"""The rotation of `hadamard`: orthonormal at any width, and a channel is spread over all of them."""

import torch

from gpt2.compression.codecs import full_rank, needs_calibration
from gpt2.compression.codecs.hadamard import Hadamard


def test_the_rotation_is_orthonormal_and_takes_no_mean_off():
    for d in (1, 2, 7, 12, 16, 20, 32, 40, 48, 64, 80, 96, 112, 120, 128, 160, 192, 256):
        transform = Hadamard().transform(d)
        assert transform.E.shape == transform.D.shape == (1, d, d) and full_rank("hadamard", d) == d
        assert torch.allclose(transform.E[0].T @ transform.E[0], torch.eye(d, dtype=torch.float64), atol=1e-12)
        assert torch.equal(transform.D[0], transform.E[0].T) and not transform.mean.any()
    assert not needs_calibration("hadamard")


def test_a_channel_is_spread_over_all_its_power_of_two():
    """Evenly over the Hadamard factor; over the rest, as a cosine basis spreads."""
    for d, power in {64: 64, 128: 128, 80: 16, 96: 32, 12: 4, 45: 1}.items():
        energy = Hadamard().transform(d).E[0].square().view(power, d // power, power, d // power).sum((1, 3)) * power
        assert torch.allclose(energy / (d // power), torch.ones(power, power, dtype=torch.float64)), d

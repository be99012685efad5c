"""Intervals and tests of differences against what is known of them."""

import math

import numpy as np
import pytest

from gpt2.evaluation.statistics import mean_interval, paired_bootstrap, sign_test, spread


@pytest.mark.parametrize("shape", [(1, 10), (3, 64), (2, 2047)])
def test_a_constant_shift_has_no_width(shape):
    """Also where the last block of a segment is shorter than the others."""
    for shift in (0.0, 0.05, -0.3):
        assert paired_bootstrap(np.full(shape, shift)) == pytest.approx([math.expm1(shift)] * 2, abs=1e-9)
    assert mean_interval(np.full(7, -0.3)) == pytest.approx((-0.3, -0.3))


def test_the_interval_covers_the_mean_and_narrows_with_tokens():
    noise = np.random.default_rng(0).normal(0, 1, (16, 2047))
    noise -= noise.mean()
    low, high = paired_bootstrap(noise)
    assert low < 0 < high
    # ± 1.96 σ / √n for independent tokens
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(noise.size), rel=0.2)
    few_low, few_high = paired_bootstrap(noise[:2])
    assert few_high - few_low > 2 * (high - low)
    assert paired_bootstrap(noise, level=0.5)[1] < high
    few = noise[:4, :200]
    assert paired_bootstrap(few, 1) == paired_bootstrap(few, 1) != paired_bootstrap(few, 2), "by seed"
    assert mean_interval(few[0], 1) == mean_interval(few[0], 1) != mean_interval(few[0], 2)
    rng = np.random.default_rng(0)
    covered = [low <= 1 <= high for low, high in (mean_interval(rng.normal(1, 2, 60), seed) for seed in range(200))]
    assert 0.88 < np.mean(covered) <= 0.99


def test_tokens_of_a_block_move_together():
    """Neighbours that agree are one observation, not 64: the interval is eight times as wide."""
    blocks = np.random.default_rng(0).normal(0, 1, (4, 32))
    together, apart = np.repeat(blocks, 64, axis=1), np.random.default_rng(0).normal(0, 1, (4, 2048))
    widths = [np.subtract(*paired_bootstrap(x)) for x in (together, apart)]
    assert widths[0] / widths[1] == pytest.approx(8, rel=0.25)


def test_the_sign_test_and_quartiles_are_exact():
    assert sign_test(0, 0) == 1 and sign_test(5, 5) == 1 and sign_test(0, 1) == 1
    assert sign_test(0, 6) == sign_test(6, 0) == pytest.approx(2 / 64)
    assert sign_test(1, 8) == pytest.approx(2 * (1 + 9) / 512)
    assert spread("ms", [4, 1, 3, 2, 5]) == {"ms_median": 3, "ms_quartiles": [2, 4]}

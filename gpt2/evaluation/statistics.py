"""Medians with quartiles, and intervals for differences that were measured on the same tokens or prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BLOCK = 64  # tokens that are resampled together, because neighbours in a text aren't independent
FEWEST_BLOCKS = 8
RESAMPLES = 2000
QUARTILES = (0.25, 0.5, 0.75)


def spread(name: str, values: Sequence[float]) -> dict[str, float | list[float]]:
    """Median and quartiles of values, under keys that start with `name`."""
    low, median, high = (float(value) for value in np.quantile(values, QUARTILES))
    return {f"{name}_median": median, f"{name}_quartiles": [low, high]}


def paired_bootstrap(difference: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of exp(mean(difference)) − 1 for per-token differences of log-likelihood.

    difference: [segments, tokens], compressed − baseline. Blocks of 64 tokens are resampled 2000 times. The baseline
    and the compressed run share each resample, which makes the interval much narrower than two separate ones. Of fewer
    than 512 tokens there are eight shorter blocks, as one block alone would leave no width at all.
    """
    segments, tokens = difference.shape
    edges = range(0, tokens, max(1, min(BLOCK, difference.size // FEWEST_BLOCKS)))
    sums = np.add.reduceat(difference, edges, axis=1).ravel()
    sizes = np.tile(np.diff([*edges, tokens]), segments)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.expm1(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
    return float(low), float(high)


def mean_interval(values: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent values [n], such as paired differences."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_test(first: int, second: int) -> float:
    """Two-sided exact p-value of `first` pairs that favour one side and `second` the other, under no difference."""
    pairs = first + second
    tail = sum(math.comb(pairs, k) for k in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**pairs)

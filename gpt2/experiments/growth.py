"""How a cost grows: the exponent of a power law through measured points, beside the one that arithmetic expects.

A cost that is proportional to x has exponent 1, one that doesn't depend on x has 0. Where a cost is a sum of terms that
grow differently, its predicted values are fitted at the same points, so that expected and measured are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpt2.common.errors import PluginError
from gpt2.evaluation.statistics import RESAMPLES

LEAST_POINTS = 4
LEAST_REPEATS = 3  # below which timings have no spread to speak of
TOLERANCE = 0.15  # of an exponent: what a fixed cost, or arithmetic that is faster on larger matrices, may bend
WIDEST = 0.3  # half an interval: beyond it an exponent isn't known
SECONDS, BYTES = "s", "bytes"
AGREES, DIFFERS, UNKNOWN = "agrees", "differs", "can't tell"


@dataclass(frozen=True)
class Point:
    """One size. predicted: cost by arithmetic, in any unit; measure: what it costs now, in its claim's unit."""

    x: float
    predicted: float
    measure: Callable[[], float]


@dataclass(frozen=True)
class Claim:
    """What a step's cost does as one thing grows. on: the model or shape; unit: SECONDS or BYTES."""

    step: str
    against: str
    on: str
    points: Sequence[Point]
    unit: str = SECONDS


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y on log x; x, y positive, [n]."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def exponent_interval(
    x: Sequence[float], values: np.ndarray, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the slope through medians; values [n, repeats], resampled at each x."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(values.shape[1], size=(RESAMPLES, *values.shape))
    medians = np.median(np.take_along_axis(values[None], drawn, axis=2), axis=2)  # [RESAMPLES, n]
    slopes = np.polyfit(np.log(x), np.log(medians).T, 1)[0]
    low, high = np.quantile(slopes, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def verdict(expected: float, interval: tuple[float, float]) -> str:
    """Whether an interval reaches the expected exponent, to TOLERANCE; wider than WIDEST each way it says nothing."""
    low, high = interval
    if (high - low) / 2 > WIDEST:
        return UNKNOWN
    return AGREES if low - TOLERANCE <= expected <= high + TOLERANCE else DIFFERS


def measure(claim: Claim, repeats: int) -> dict:
    """A claim's results record. Points take turns, in an order that turns round with every repeat.

    The smallest one warms up. Bytes are the same every time, and are asked for once. Raises PluginError for fewer than
    LEAST_POINTS points.
    """
    points = sorted(claim.points, key=lambda point: point.x)
    if len(points) < LEAST_POINTS:
        raise PluginError(
            f"{claim.step} against {claim.against}: {len(points)} sizes are no slope, give {LEAST_POINTS} or more"
        )
    if claim.unit == BYTES:
        return _record(claim, points, np.array([[point.measure()] for point in points]))
    points[0].measure()
    values = np.zeros((len(points), repeats))
    for n in range(repeats):
        for i in range(len(points))[:: -1 if n % 2 else 1]:
            values[i, n] = points[i].measure()
    return _record(claim, points, values)


def at(slope: dict, x: float) -> float:
    """Cost at another size, between the measured ones of a record by their logarithms."""
    return float(np.exp(np.interp(np.log(x), np.log(slope["x"]), np.log(slope["medians"]))))


def _record(claim: Claim, points: Sequence[Point], values: np.ndarray) -> dict:
    x = [point.x for point in points]
    medians = np.median(values, axis=1)
    slope, interval = exponent(x, medians), exponent_interval(x, values)
    expected = exponent(x, [point.predicted for point in points])
    known = claim.unit == BYTES or values.shape[1] >= LEAST_REPEATS
    line = np.polyval(np.polyfit(np.log(x), np.log(medians), 1), np.log(x))
    return {
        "step": claim.step,
        "against": claim.against,
        "on": claim.on,
        "unit": claim.unit,
        "x": x,
        "predicted": [point.predicted for point in points],
        "values": values.tolist(),
        "medians": medians.tolist(),
        "expected_exponent": expected,
        "exponent": slope,
        "exponent_interval": list(interval),
        "farthest_from_line": float(np.expm1(np.abs(np.log(medians) - line).max())),
        "verdict": verdict(expected, interval) if known else UNKNOWN,
    }

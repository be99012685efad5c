"""How a cost grows: the exponent of a power law fitted to measured costs, beside the exponent of predicted costs.

A cost proportional to x has exponent 1, one that doesn't depend on x has exponent 0. A cost may be a sum of terms that
grow differently, so the expected exponent is fitted to predicted costs at the same points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpt2.common.errors import PluginError
from gpt2.evaluation.statistics import RESAMPLES

LEAST_POINTS = 4
LEAST_REPEATS = 3  # with fewer timings there is no verdict
TOLERANCE = 0.15  # of an exponent: it allows for fixed costs, and for arithmetic that is faster on larger matrices
WIDEST = 0.3  # largest half width of an interval that allows a verdict
SECONDS, BYTES = "s", "bytes"
AGREES, DIFFERS, UNKNOWN = "agrees", "differs", "can't tell"


@dataclass(frozen=True)
class Point:
    """One size. predicted: its counted cost, in any unit. measure: returns its measured cost in the series' unit."""

    x: float
    predicted: float
    measure: Callable[[], float]


@dataclass(frozen=True)
class Series:
    """The costs of a step as one quantity grows.

    step: what is done. against: the quantity. on: the model or shape. unit: SECONDS or BYTES.
    """

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
    """Percentile bootstrap interval of the slope through medians; values [n, repeats] are resampled at each x."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(values.shape[1], size=(RESAMPLES, *values.shape))
    medians = np.median(np.take_along_axis(values[None], drawn, axis=2), axis=2)  # [RESAMPLES, n]
    slopes = np.polyfit(np.log(x), np.log(medians).T, 1)[0]
    low, high = np.quantile(slopes, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def verdict(expected: float, interval: tuple[float, float]) -> str:
    """Whether an interval contains the expected exponent, to TOLERANCE; UNKNOWN for intervals wider than WIDEST."""
    low, high = interval
    if (high - low) / 2 > WIDEST:
        return UNKNOWN
    return AGREES if low - TOLERANCE <= expected <= high + TOLERANCE else DIFFERS


def measure(series: Series, repeats: int) -> dict:
    """Measure a series; returns its results record.

    Points take turns, in an order that is reversed with every repeat, after the smallest has been measured once to warm
    up. Bytes are measured once. Raises PluginError for fewer than LEAST_POINTS points.
    """
    points = sorted(series.points, key=lambda point: point.x)
    if len(points) < LEAST_POINTS:
        raise PluginError(
            f"{series.step} against {series.against}: expected {LEAST_POINTS} sizes or more, got {len(points)}"
        )
    if series.unit == BYTES:
        return _record(series, points, np.array([[point.measure()] for point in points]))
    points[0].measure()
    values = np.zeros((len(points), repeats))
    for n in range(repeats):
        for i in range(len(points))[:: -1 if n % 2 else 1]:
            values[i, n] = points[i].measure()
    return _record(series, points, values)


def at(slope: dict, x: float) -> float:
    """Cost at another size, interpolated between the medians of a record on logarithmic axes."""
    return float(np.exp(np.interp(np.log(x), np.log(slope["x"]), np.log(slope["medians"]))))


def _record(series: Series, points: Sequence[Point], values: np.ndarray) -> dict:
    x = [point.x for point in points]
    medians = np.median(values, axis=1)
    slope, interval = exponent(x, medians), exponent_interval(x, values)
    expected = exponent(x, [point.predicted for point in points])
    known = series.unit == BYTES or values.shape[1] >= LEAST_REPEATS
    line = np.polyval(np.polyfit(np.log(x), np.log(medians), 1), np.log(x))
    return {
        "step": series.step,
        "against": series.against,
        "on": series.on,
        "unit": series.unit,
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

"""Exponents of measured costs, and whether they are the predicted ones."""

import numpy as np
import pytest

from gpt2.common.errors import PluginError
from gpt2.experiments import power_law
from gpt2.experiments.power_law import Point, Series


def series(power: float, factor: float = 3.0, predicted: float = 1.0, noise: float = 0.0) -> Series:
    """Costs that are a power law to some noise."""
    rng = np.random.default_rng(0)

    def point(x: float) -> Point:
        return Point(x, x**predicted, lambda: factor * x**power * float(np.exp(noise * rng.standard_normal())))

    return Series("step", "x", "nothing", [point(x) for x in (8.0, 1.0, 4.0, 2.0, 16.0)])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(power):
    found = power_law.measure(series(power), repeats=3)
    assert found["exponent"] == pytest.approx(power, abs=1e-9)
    assert found["exponent_interval"] == pytest.approx([power, power], abs=1e-9)
    assert found["x"] == [1, 2, 4, 8, 16]  # in order, whatever order they came in
    assert found["farthest_from_line"] == pytest.approx(0, abs=1e-9)
    assert found["verdict"] == (power_law.AGREES if power == 1 else power_law.DIFFERS)
    assert power_law.at(found, 4) == pytest.approx(3 * 4**power)
    assert power_law.at(found, 3) == pytest.approx(3 * 3**power), "between measured sizes"


@pytest.mark.parametrize(("interval", "verdict"), [
    ((0.9, 0.95), power_law.AGREES),  # within the tolerance
    ((0.6, 0.8), power_law.DIFFERS),
    ((1.2, 1.3), power_law.DIFFERS),
    ((0.5, 1.5), power_law.UNKNOWN),  # it holds the exponent, and many others
])  # fmt: skip
def test_verdict_is_computed(interval, verdict):
    assert power_law.verdict(1.0, interval) == verdict


def test_interval_holds_the_exponent_of_noisy_costs_and_narrows_with_repeats():
    wide, narrow = (power_law.measure(series(1.0, noise=0.2), repeats=n)["exponent_interval"] for n in (3, 60))
    assert wide[0] < 1 < wide[1] and narrow[0] < 1 < narrow[1]
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2


def test_expected_exponent_is_that_of_predicted_costs():
    """Terms that grow differently: neither 1 nor 2."""
    points = [Point(x, x + x**2, lambda x=x: 5 * (x + x**2)) for x in (0.25, 0.5, 1, 2, 4)]
    found = power_law.measure(Series("step", "x", "nothing", points), repeats=3)
    assert found["expected_exponent"] == pytest.approx(1.5, abs=0.01)
    assert found["exponent"] == pytest.approx(found["expected_exponent"]) and found["verdict"] == power_law.AGREES


def test_points_take_turns():
    asked = []
    points = [Point(x, x, lambda x=x: asked.append(x) or float(x)) for x in (1, 2, 3, 4)]
    power_law.measure(Series("step", "x", "nothing", points), repeats=2)
    assert asked == [1] + [1, 2, 3, 4] + [4, 3, 2, 1]  # warmed up, then there and back
    asked.clear()
    power_law.measure(Series("step", "x", "nothing", points, power_law.BYTES), repeats=5)
    assert asked == [1, 2, 3, 4]
    with pytest.raises(PluginError, match="expected 4 sizes or more, got 3"):
        power_law.measure(Series("step", "x", "nothing", points[:3]), repeats=1)
